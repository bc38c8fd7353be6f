"""Architectures that are trained as they are: blocks in stacks, and the base's own head or a new one beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from worker.trainer.families.loading import load_base, marker, name_classes, note
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.interface import text_inputs

#: Where the configuration does not say how much the positions carry (rotary and relative ones carry any length).
_UNBOUNDED = 1 << 20


@dataclass(frozen=True, slots=True)
class TransformerFamily:
    """Where such a model keeps its parts, as attribute paths.

    stacks: the lists of blocks (an encoder's and a decoder's). head: beginning of the names of a new head's parameters;
    empty where the base brings the head that the task needs. position_offset: position embeddings that no token takes.
    fixed: ends of the names of parameters that are computed, not learnt, and never train.
    """

    model_type: str
    auto_class: Any
    stacks: tuple[str, ...]
    head: str = ""
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    unmovable: tuple[str, ...] = ()
    position_offset: int = 0
    fixed: tuple[str, ...] = ()

    def load(self, path: Path, task: TaskSpec) -> PreTrainedModel:
        """See `Family.load`."""
        continues = False

        def new(config: PreTrainedConfig) -> tuple[str, ...]:
            nonlocal continues
            if marker(config).get("pooling_layer"):  # a classifier's of this service: of no use to a token
                config.num_hidden_layers -= 1
                note(config, pooling_layer=False)
            if task.labels:
                continues = name_classes(config, task)
            return (self.head,) if self.head else ()

        model = load_base(path, self.auto_class, self.model_type, new=new)
        with torch.no_grad():
            for name in () if continues else self.head_parameters(model):
                model.get_parameter(name).zero_()
        return model

    def max_length(self, model: PreTrainedModel) -> int:
        """Of the position embeddings."""
        positions = getattr(model.config, "max_position_embeddings", None)
        return _UNBOUNDED if positions is None else int(positions) - self.position_offset

    def head_parameters(self, model: nn.Module) -> list[str]:
        """Those of a new head."""
        return [name for name, _ in model.named_parameters() if self.head and name.startswith(self.head)]

    def head_module(self, model: nn.Module) -> nn.Linear:
        """A new head, which reads each token's vector."""
        head = model.get_submodule(self.head.removesuffix("."))
        assert isinstance(head, nn.Linear)
        return head

    def token_vectors(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """What a new head reads, (rows, length, width)."""
        caught: list[Tensor] = []
        hook = self.head_module(model).register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
        try:
            model(**text_inputs(batch))
        finally:
            hook.remove()
        return caught[0].float()

    def body_parameters(self, model: nn.Module, *, last_layers: int | None = None) -> list[str]:
        """All but a new head's, or the last blocks' of each stack."""
        head = set(self.head_parameters(model))
        names = [name for name, _ in model.named_parameters() if name not in head and not name.endswith(self.fixed)]
        if last_layers is None:
            return names
        kept: list[str] = []
        for stack in self.stacks:
            depth = len(model.get_submodule(stack))  # type: ignore[arg-type]
            kept += [f"{stack}.{index}." for index in range(max(0, depth - last_layers), depth)]
        return [name for name in names if name.startswith(tuple(kept))]
