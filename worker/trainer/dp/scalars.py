"""Scalars that ride along with the gradient in one noised sum: clipped losses, and adaptive clipping's count.

Each is a number of every unit within ±Δ of zero, so that a unit replaced by nothing moves its sum by at most Δ. They
are centred because nothing is zero: that halves Δ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from app.privacy.plan import LossSum, QuantileSum

#: The norm bound stays within this factor of where it started, whatever the noise says.
_LARGEST_DRIFT = 1e4


@dataclass(frozen=True, slots=True)
class StepRelease:
    """What a step released beside its update, noised with it as one vector.

    loss: mean loss of a unit, see `app.privacy.loss_curve`; None where the plan has no curve.
    """

    loss: float | None = None


def centred_losses(losses: Tensor, rider: LossSum) -> Tensor:
    """(units,) float64 within ±bound / 2, of each unit's mean loss; one that is not finite counts as the bound."""
    values = losses.detach().to(torch.float64)
    values = torch.where(torch.isfinite(values), values, torch.full_like(values, rider.bound))
    return values.clamp(0.0, rider.bound) - rider.bound / 2.0


def centred_count(squared_norms: Tensor, max_grad_norm: float) -> Tensor:
    """(units,) float64: ½ where the unit's gradient is within the bound, -½ where it is not, or not finite."""
    within = squared_norms.detach().sqrt() <= max_grad_norm
    return within.to(torch.float64) - 0.5


def mean_loss(total: float, rider: LossSum, expected_batch_size: float) -> float:
    """From the noised sum of centred losses to the mean over all units; may leave [0, bound], as noise does."""
    return rider.bound / 2.0 + total / expected_batch_size


def adapted(
    max_grad_norm: float, total: float, rider: QuantileSum, expected_batch_size: float, initial: float
) -> float:
    """The next step's norm bound, from the noised sum of centred counts (Andrew et al. 2021, Algorithm 1)."""
    within = min(1.0, max(0.0, 0.5 + total / expected_batch_size))
    bound = max_grad_norm * math.exp(-rider.learning_rate * (within - rider.target_quantile))
    return min(max(bound, initial / _LARGEST_DRIFT), initial * _LARGEST_DRIFT)
