"""Which figures are worth telling beside their noise, and 95 % intervals. All of it follows from released numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Z95 = 1.959964

#: A figure says nothing where the noise's 95 % half-width is so large: of a share, as a number, and of what a ratio
#: divides by, relative to it.
MOST_NOISE = 0.5


def readable(size: float, noise_std: float, most: float = MOST_NOISE) -> bool:
    """Whether noise of that standard deviation stays small beside a number of that size."""
    return noise_std == 0.0 or Z95 * noise_std < most * size


def relative_noise(sizes: Tensor, noise_std: float) -> Tensor:
    """The noise's 95 % half-width beside each of these sums, at most 1, which it is where nothing is left of one."""
    if noise_std == 0.0:
        return torch.zeros_like(sizes)
    return (Z95 * noise_std / sizes.clamp(min=1e-9)).clamp(max=1.0)


def share_interval(share: float, num_units: int, noise_std: float) -> list[float]:
    """95 % interval of a mean over units of shares in [0, 1], whose sum carries noise of that standard deviation."""
    half_width = Z95 * math.sqrt(share * (1.0 - share) / num_units + (noise_std / num_units) ** 2)
    return [max(0.0, share - half_width), min(1.0, share + half_width)]
