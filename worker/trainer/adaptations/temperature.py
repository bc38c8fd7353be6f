"""Temperature scaling (Guo et al. 2017): one number that all logits are multiplied by, behind what was trained before.

Its logarithm trains: so it stays positive, and neither its gradient, Σ over classes of (p - y) · z of a record, nor how
far a step takes it depends on the scale that the logits came in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from app.catalog.adaptations import Temperature
from worker.trainer.adaptations.adapter import Adapter
from worker.trainer.failure import TrainerFailure
from worker.trainer.families.interface import Family, PooledFamily


class Scale(nn.Module):
    """exp(log) times logits, (rows, classes): the inverse of a temperature; 1 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(1))

    def forward(self, logits: Tensor) -> Tensor:
        """Same shape."""
        # One for each row before anything else is done with it, so that engines see each row's gradient.
        return logits * (logits.new_zeros(len(logits), 1) + self.log).exp()


class ScaledLinear(nn.Linear):
    """In the place of a linear head while a job trains; weight and bias are the head's own."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.scale = Scale()

    def unscaled(self, x: Tensor) -> Tensor:
        """The head's logits, (rows, classes)."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scaled logits."""
        scaled: Tensor = self.scale(self.unscaled(x))
        return scaled

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same as a plain head."""
        head = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        factor = self.scale.log.exp()
        head.weight.copy_(self.weight * factor)
        if self.bias is not None:
            head.bias.copy_(self.bias * factor)
        return head.requires_grad_(False)


def _parameters(model: PreTrainedModel, family: Family, adaptation: Temperature) -> list[str]:
    if not isinstance(family, PooledFamily):
        raise TrainerFailure("base_model_invalid", "this family has no head on one vector a record")
    head = family.head_module(model)
    (name,) = (name for name, module in model.named_modules() if module is head)
    if not isinstance(head, ScaledLinear):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, ScaledLinear(head))
    return [f"{name}.scale.log"]


def _merge(model: PreTrainedModel) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, ScaledLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.merged())


TEMPERATURE = Adapter(_parameters, _merge, with_head=False)
