"""Units dealt to ranks: each once, whole, balanced; rounds that every rank sees equally often."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.trainer.dp.partition import in_rounds, units_of_rank

LENGTHS = np.arange(1, 301)


@given(
    units=st.lists(st.lists(st.integers(0, 299), max_size=5), max_size=40),
    world_size=st.integers(1, 5),
)
def test_every_unit_has_one_rank_and_tokens_are_balanced(units: list[list[int]], world_size: int) -> None:
    shares = [units_of_rank(units, LENGTHS, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(unit for share in shares for unit in share) == list(range(len(units)))
    assert all(share == sorted(share) for share in shares)
    tokens = [sum(int(LENGTHS[row]) for row in rows) for rows in units]
    loads = [sum(tokens[unit] for unit in share) for share in shares]
    assert max(loads) - min(loads) <= max(tokens, default=0), "no rank waits longer than one unit takes"


def test_fewer_units_than_ranks_leave_some_without() -> None:
    shares = [units_of_rank([[5]], LENGTHS, rank=rank, world_size=3) for rank in range(3)]
    assert shares == [[0], [], []]
    assert [units_of_rank([], LENGTHS, rank=rank, world_size=2) for rank in range(2)] == [[], []]


@pytest.mark.parametrize(("count", "world_size"), [(0, 2), (1, 2), (5, 2), (6, 3)])
def test_ranks_see_equally_many_rounds(count: int, world_size: int) -> None:
    dealt = [list(in_rounds(range(count), rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(rounds) for rounds in dealt}) == 1
    assert sorted(item for rounds in dealt for item in rounds if item is not None) == list(range(count))
