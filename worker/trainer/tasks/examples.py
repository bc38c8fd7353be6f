"""Encoded rows, whatever the task: sequences that are padded in batches, and tensors of one entry a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Indices = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """sequences: name → one vector of integers a row, without padding. tensors: name → (rows, …).

    lengths: (rows,), what a row takes of a physical batch, in tokens. lost: side of a record → (rows,), tokens beyond
    the longest input; private, and not kept by `select`.
    """

    sequences: Mapping[str, Sequence[npt.NDArray[Any]]]
    tensors: Mapping[str, Tensor]
    lengths: npt.NDArray[np.int64]
    lost: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, rows: Indices) -> Examples:
        """These rows, in this order."""
        chosen = np.asarray(rows, dtype=np.int64)
        return Examples(
            {name: [values[row] for row in chosen] for name, values in self.sequences.items()},
            {name: values[torch.from_numpy(chosen)] for name, values in self.tensors.items()},
            self.lengths[chosen],
        )

    def padded(self, name: str, rows: Indices, padding: int) -> tuple[Tensor, Tensor]:
        """The rows' sequences as one tensor (rows, longest), and the mask (rows, longest) of what is no padding."""
        values = [torch.from_numpy(self.sequences[name][row]) for row in rows]
        stacked = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
        lengths = torch.tensor([len(value) for value in values])
        return stacked, (torch.arange(stacked.shape[1]) < lengths[:, None]).to(torch.int64)


def lengths_of(sequences: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """(rows,)"""
    return np.fromiter((len(values) for values in sequences), dtype=np.int64, count=len(sequences))
