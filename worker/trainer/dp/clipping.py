"""How much of a unit's gradient enters the sum, as a function of its norm alone.

A rule gives a factor per unit; the sensitivity of the clipped sum under zero_out is the largest norm · factor.
A unit whose gradient is not finite has factor zero: it contributes exactly nothing.
"""

from __future__ import annotations

from collections.abc import Callable

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
    "automatic": _automatic,
    "none": _none,
}


def clip_factors(clipping: str, norms: Tensor, max_grad_norm: float) -> Tensor:
    """Factors in the shape of `norms`; zero where a norm is not finite."""
    finite = torch.isfinite(norms)
    safe = torch.where(finite, norms, torch.zeros_like(norms))
    return _RULES[clipping](safe, max_grad_norm) * finite


def clipping_sensitivity(clipping: str, max_grad_norm: float) -> float:
    """L2 norm that one unit can add to the clipped sum; ValueError where it has no bound."""
    if clipping == "flat":
        return max_grad_norm
    if clipping == "automatic":
        return 1.0
    raise ValueError(f"clipping {clipping!r} bounds no contribution")
