"""Independent answers: a one-unit-at-a-time autograd loop, and Opacus in its hooks mode where that is right."""

from __future__ import annotations

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
