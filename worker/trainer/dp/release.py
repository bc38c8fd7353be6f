"""One-shot Gaussian releases: a private mean's sum, confusion counts."""

from __future__ import annotations

import torch
from torch import Tensor

from app.privacy.plan import GaussianRelease
from worker.trainer.dp.randomness import RELEASE, JobRandomness


def gaussian_release(
    randomness: JobRandomness, part: GaussianRelease, total: Tensor, *, tolerance: float = 0.0
) -> Tensor:
    """`total` (any shape: a sum over units, each within part.sensitivity in L2) plus noise; float64, on the CPU.

    Deterministic in the key: calling it again on the same part and another total would reuse the noise, so a part is
    released once. tolerance: relative, how far rounding may carry the total past the sensitivity; the noise covers it.
    Raises ValueError on a total that is not finite or a part without noise.
    """
    if part.noise_multiplier <= 0.0:
        raise ValueError("a release needs noise")
    noised = total.detach().to(device="cpu", dtype=torch.float64, copy=True).contiguous()
    if not bool(torch.isfinite(noised).all()):
        raise ValueError("the total is not finite: bound each unit before summing")
    std = part.noise_multiplier * part.sensitivity * (1.0 + tolerance)
    randomness.add_noise_(noised, std, phase=part.name, step=0, stream=RELEASE)
    return noised


def bounded_rows(vectors: Tensor, bound: float) -> Tensor:
    """Each row (unit) scaled to L2 norm at most `bound`, in float64; a row that is not finite becomes zero."""
    values = vectors.detach().to(torch.float64)
    finite = torch.isfinite(values).all(dim=1, keepdim=True)
    values = torch.where(finite, values, torch.zeros_like(values))
    norms = values.norm(dim=1, keepdim=True)
    return values * (bound / norms.clamp(min=bound))
