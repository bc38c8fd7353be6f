"""How much of a unit's gradient enters the sum, as a function of its norms alone.

A rule gives a factor per unit; the sensitivity of the clipped sum under zero_out is the largest norm · factor.
A unit whose gradient is not finite has factor zero: it contributes exactly nothing. Per-layer clipping bounds each of
the L layers by C / √L on its own, so that the whole stays within C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

#: γ of automatic clipping g / (‖g‖ + γ) (Bu et al. 2023).
AUTOMATIC_GAMMA = 0.01


def _flat(norms: Tensor, max_grad_norm: float) -> Tensor:
    # C / max(n, C) is min(1, C/n) without a division by zero.
    return max_grad_norm / norms.clamp(min=max_grad_norm)


def _automatic(norms: Tensor, max_grad_norm: float) -> Tensor:
    return 1.0 / (norms + AUTOMATIC_GAMMA)


def _none(norms: Tensor, max_grad_norm: float) -> Tensor:
    return torch.ones_like(norms)


_RULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "flat": _flat,
    "adaptive": _flat,  # to the bound of the step at hand
    "automatic": _automatic,
    "none": _none,
}


def clip_factors(clipping: str, norms: Tensor, max_grad_norm: float) -> Tensor:
    """Factors in the shape of `norms`; zero where a norm is not finite."""
    finite = torch.isfinite(norms)
    safe = torch.where(finite, norms, torch.zeros_like(norms))
    return _RULES[clipping](safe, max_grad_norm) * finite


def clip_factors_by_parameter(clipping: str, squared: Mapping[str, Tensor], max_grad_norm: float) -> dict[str, Tensor]:
    """squared: ‖unit gradient‖² by parameter, each (units,); the factors likewise."""
    total = torch.stack(list(squared.values())).sum(0)
    if clipping != "per_layer":
        return dict.fromkeys(squared, clip_factors(clipping, total.sqrt(), max_grad_norm))
    layers: dict[str, Tensor] = {}
    for name, value in squared.items():
        layer = layer_of(name)
        layers[layer] = layers[layer] + value if layer in layers else value
    bound = max_grad_norm / len(layers) ** 0.5
    finite = torch.isfinite(total)  # a unit that is broken in one layer is left out of all
    factors = {layer: clip_factors("flat", value.sqrt(), bound) * finite for layer, value in layers.items()}
    return {name: factors[layer_of(name)] for name in squared}


def layer_of(name: str) -> str:
    """The module that holds the parameter: a weight and its bias are clipped together."""
    return name.rpartition(".")[0]


def clipping_sensitivity(clipping: str, max_grad_norm: float) -> float:
    """L2 norm that one unit can add to the clipped sum; ValueError where it has no bound."""
    if clipping in ("flat", "per_layer", "adaptive"):
        return max_grad_norm
    if clipping == "automatic":
        return 1.0
    raise ValueError(f"clipping {clipping!r} bounds no contribution")
