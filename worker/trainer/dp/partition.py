"""Which rank takes which units of a drawn batch, and which physical batches of a pass over all rows.

Every rank computes the same answer from the same draw, so that nothing has to be said. Speed only: the sum runs over
the same units whoever holds them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Item = TypeVar("Item")


def units_of_rank(
    rows_of_unit: Sequence[Sequence[int]],
    lengths: Sequence[int] | npt.NDArray[np.integer],
    *,
    rank: int,
    world_size: int,
) -> list[int]:
    """Positions in `rows_of_unit` of one rank's whole units, ascending; over all ranks each position comes once.

    Balanced by tokens: the longest unit first, each to the rank that has the least so far (Graham's LPT rule). A rank
    may get none.
    """
    if world_size == 1:
        return list(range(len(rows_of_unit)))
    tokens = [sum(int(lengths[row]) for row in rows) for rows in rows_of_unit]
    loads = [(0, 0, other) for other in range(world_size)]  # tokens, units, rank
    mine = []
    for unit in sorted(range(len(tokens)), key=lambda unit: -tokens[unit]):
        load, count, chosen = loads[0]
        heapq.heapreplace(loads, (load + tokens[unit], count + 1, chosen))
        if chosen == rank:
            mine.append(unit)
    return sorted(mine)


def in_rounds(items: Sequence[Item], *, rank: int, world_size: int) -> Iterator[Item | None]:
    """This rank's items, dealt in turn, and None in a round in which it has none: every rank sees as many rounds."""
    for start in range(0, len(items), world_size):
        yield items[start + rank] if start + rank < len(items) else None
