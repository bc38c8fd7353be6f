"""The one place where ranks meet: sums over each rank's units become sums over the whole batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks_(tensors: Iterable[Tensor]) -> None:
    """All-reduces each tensor in place; does nothing in a single process.

    Noise comes after this, once: it is a pure function of the job's key, so that every rank adds the same.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) in a single process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
