"""Independent answers: a one-unit-at-a-time autograd loop, and Opacus in its hooks mode where that is right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.trainer.dp.cases import Batch


def unit_gradients(
    model: nn.Module, names: list[str], loss, batch: Batch, unit_index: Tensor
) -> list[dict[str, Tensor]]:
    """Mean gradient of each unit, by one backward for each row; units in order of appearance."""
    parameters = dict(model.named_parameters())
    units = list(dict.fromkeys(unit_index.tolist()))
    result = []
    for unit in units:
        rows = [row for row, other in enumerate(unit_index.tolist()) if other == unit]
        total = {name: torch.zeros_like(parameters[name]) for name in names}
        for row in rows:
            one = {key: value[row : row + 1] for key, value in batch.items()}
            gradients = torch.autograd.grad(
                loss(model, one)[0], [parameters[name] for name in names], allow_unused=True
            )
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient / len(rows)
        result.append(total)
    return result


def norm(gradient: dict[str, Tensor]) -> float:
    return float(sum(value.double().square().sum() for value in gradient.values()) ** 0.5)


def clipped_sum(gradients: list[dict[str, Tensor]], max_grad_norm: float) -> dict[str, Tensor]:
    factors = [min(1.0, max_grad_norm / max(norm(gradient), 1e-300)) for gradient in gradients]
    return {
        name: sum(factor * gradient[name].double() for factor, gradient in zip(factors, gradients, strict=True))
        for name in gradients[0]
    }


def opacus_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, ghost: bool, max_grad_norm: float, noise_multiplier: float
) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """Opacus' wrapped model, and what takes a batch's losses, (rows,), through backward, noise and the optimizer."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    settings = {"noise_multiplier": noise_multiplier, "max_grad_norm": max_grad_norm, "loss_reduction": "mean"}
    if not ghost:
        hooked = GradSampleModule(model, loss_reduction="mean")
        plain = DPOptimizer(optimizer, expected_batch_size=1, **settings)

        def step(losses: Tensor) -> None:
            plain.expected_batch_size = len(losses)
            losses.mean().backward()
            plain.step()
            plain.zero_grad(set_to_none=True)

        return hooked, step
    clipped = GradSampleModuleFastGradientClipping(model, max_grad_norm=max_grad_norm, use_ghost_clipping=True)
    fast = DPOptimizerFastGradientClipping(optimizer, expected_batch_size=1, **settings)

    def ghost_step(losses: Tensor) -> None:
        fast.expected_batch_size = len(losses)
        DPTensorFastGradientClipping(clipped, fast, losses, "mean").backward()
        fast.step()
        fast.zero_grad(set_to_none=True)

    return clipped, ghost_step


def opacus_squared_norms(model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> Tensor:
    """‖gradient‖² of each row, (rows,), from Opacus' hooks."""
    from opacus.grad_sample import GradSampleModule

    hooked = GradSampleModule(model, loss_reduction="sum")
    try:
        loss(hooked, batch).sum().backward()
        samples = [p.grad_sample.flatten(1) for p in hooked.parameters() if p.requires_grad]
        return torch.cat(samples, 1).square().sum(1)
    finally:
        hooked.to_standard_module()
        model.zero_grad(set_to_none=True)
