"""The one place where ranks meet: sums over each rank's units become sums over the whole batch, and what only the
first rank knows becomes known to all.

A sharded model would need another reduce, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class RankLost(RuntimeError):
    """Another rank is gone or silent: nothing that was to be summed is complete."""


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) in a single process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks_(tensors: Iterable[Tensor]) -> None:
    """All-reduces each tensor in place; does nothing in a single process. Every rank ends with the same bits.

    Noise comes after this, once: it is a pure function of the job's key, so that every rank adds the same.
    """
    if rank_and_world_size()[1] > 1:
        for tensor in tensors:
            _reduce(tensor, dist.ReduceOp.SUM)


def from_first_rank(*flags: bool) -> tuple[bool, ...]:
    """What rank 0 passes, on every rank. A collective: every rank calls it equally often."""
    if rank_and_world_size()[1] == 1:
        return flags
    word = torch.tensor([int(flag) for flag in flags])
    try:
        dist.broadcast(word, src=0)
    except RuntimeError as error:
        raise RankLost("broadcast") from error
    return tuple(bool(flag) for flag in word.tolist())


def least_of_ranks(value: int) -> int:
    """The smallest of what the ranks pass. A collective."""
    if rank_and_world_size()[1] == 1:
        return value
    word = torch.tensor([value])
    _reduce(word, dist.ReduceOp.MIN)
    return int(word)


def ranks_agree(tensors: Iterable[Tensor]) -> bool:
    """Whether these float32 tensors have the same bits on every rank. A collective."""
    if rank_and_world_size()[1] == 1:
        return True
    sums = torch.stack([tensor.detach().view(torch.int32).sum(dtype=torch.int64).cpu() for tensor in tensors])
    least, most = sums.clone(), sums.clone()
    _reduce(least, dist.ReduceOp.MIN)
    _reduce(most, dist.ReduceOp.MAX)
    return torch.equal(least, most)


def _reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    try:
        dist.all_reduce(tensor, op=operation)
    except RuntimeError as error:
        raise RankLost("all_reduce") from error
