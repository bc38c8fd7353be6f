"""Cutting a drawn batch: every row once, units whole, tokens bounded, lengths alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.trainer.dp.batching import physical_batches


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 4), max_size=30),
    lengths=st.lists(st.integers(0, 50), min_size=120, max_size=120),
    max_tokens=st.integers(1, 200),
    max_rows=st.none() | st.integers(1, 10),
)
def test_rows_once_units_whole_tokens_bounded(sizes, lengths, max_tokens, max_rows) -> None:
    starts = np.cumsum([0, *sizes])
    units = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]
    batches = list(physical_batches(units, lengths, max_tokens=max_tokens, max_rows=max_rows))
    assert sorted(row for batch in batches for row in batch) == [row for unit in units for row in unit]
    owner = {row: index for index, unit in enumerate(units) for row in unit}
    for batch in batches:
        inside = {owner[row] for row in batch}
        assert len(batch) == sum(len(units[unit]) for unit in inside)
        if len(inside) > 1:
            assert len(batch) * max(lengths[row] for row in batch) <= max_tokens
            assert max_rows is None or len(batch) <= max_rows


def test_lengths_are_bucketed_longest_first() -> None:
    lengths = [3, 50, 4, 49, 3, 48]
    batches = list(physical_batches([[row] for row in range(6)], lengths, max_tokens=150))
    assert [batch.tolist() for batch in batches] == [[1, 3, 5], [2, 0, 4]]


def test_short_rows_are_not_padded_to_long_ones() -> None:
    lengths = [64] * 20 + [60] * 10 + [8] * 50
    batches = list(physical_batches([[row] for row in range(80)], lengths, max_tokens=100_000))
    assert [len(batch) for batch in batches] == [30, 50]


def test_nothing_drawn_is_no_batch() -> None:
    assert list(physical_batches([], [], max_tokens=10)) == []


@pytest.mark.parametrize("limits", [{"max_tokens": 0}, {"max_tokens": 1, "max_rows": 0}])
def test_room_for_a_row_is_needed(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        list(physical_batches([[0]], [1], **limits))
