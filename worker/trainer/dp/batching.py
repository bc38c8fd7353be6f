"""How a drawn batch is cut into physical batches: whole units, similar lengths, a bound on padded tokens.

Changes speed and memory only, never the update: the sum runs over the same units whatever the cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

#: Tokens from which a physical batch is about as fast per token as a larger one, and the share of a row that must be
#: its own for it to join one.
_FAST_TOKENS = 1024
_MIN_FILL = 0.8

Indices = npt.NDArray[np.int64]


def physical_batches(
    rows_of_unit: Sequence[Sequence[int]],
    lengths: Sequence[int] | npt.NDArray[np.integer],
    *,
    max_tokens: int,
    max_rows: int | None = None,
) -> Iterator[Indices]:
    """Yields arrays of row indices, longest first, so that running out of memory shows at once.

    rows_of_unit: the rows of each drawn unit. lengths: tokens of each row of the dataset (indexed by row).
    A physical batch's rows times its longest row stay within `max_tokens`, except for a unit that alone exceeds it. One
    that is large enough for fast products is closed early where the next row would be mostly padding.
    """
    if max_tokens < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError("physical batches need room for at least one row")
    longest = [max((int(lengths[row]) for row in rows), default=0) for rows in rows_of_unit]
    # Longest first; equal lengths keep their order, so that the cut is reproducible.
    order = sorted((unit for unit in range(len(rows_of_unit)) if rows_of_unit[unit]), key=lambda u: -longest[u])
    current: list[int] = []
    width = 0
    for unit in order:
        rows = rows_of_unit[unit]
        count = len(current) + len(rows)
        width = width or max(longest[unit], 1)
        full = count * width > max_tokens or (max_rows is not None and count > max_rows)
        padded = longest[unit] < _MIN_FILL * width and len(current) * width >= _FAST_TOKENS
        if current and (full or padded):
            yield np.asarray(current, dtype=np.int64)
            current, width = [], max(longest[unit], 1)
        current.extend(int(row) for row in rows)
    if current:
        yield np.asarray(current, dtype=np.int64)
