"""What a head reads of a frozen body, computed once for all rows. Private: it stays in memory, in no checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from worker.trainer.data import Dataset
from worker.trainer.dp.reduce import sum_over_ranks_
from worker.trainer.families.interface import TokenFamily
from worker.trainer.job import Job, pooled_family
from worker.trainer.tasks.examples import Indices


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """vectors: (rows, width); of tokens (all tokens, width), row behind row. lengths: (rows,), what a row takes of a
    physical batch. of_tokens: whether a row has a vector for each of its tokens."""

    vectors: Tensor
    lengths: npt.NDArray[np.int64]
    of_tokens: bool = False

    def of_rows(self, rows: Indices) -> Tensor:
        """(rows, width), or (rows, longest, width), zero where a row has no token."""
        chosen = np.asarray(rows, dtype=np.int64)
        device = self.vectors.device
        if not self.of_tokens:
            return self.vectors[torch.from_numpy(chosen).to(device)]
        ends = np.cumsum(self.lengths)
        pieces = [self.vectors[ends[row] - self.lengths[row] : ends[row]] for row in chosen]
        return nn.utils.rnn.pad_sequence(pieces, batch_first=True)


@torch.inference_mode()
def pooled_vectors(job: Job, dataset: Dataset) -> Tensor:
    """The body's vectors before centring, (rows, width), float32, on the device."""
    family = pooled_family(job)
    width = family.head_module(job.model).in_features
    out = torch.zeros(len(dataset.examples), width, device=job.device.torch_device)
    for chosen, batch in job.shared_batches(dataset.examples, dataset.single_rows):
        values = family.pooled(job.model, batch)
        out[torch.from_numpy(chosen).to(values.device)] = values
    sum_over_ranks_([out])  # each row from one rank, zeros from the others
    return out


@torch.no_grad()
def pooled_features(job: Job, pooled: Tensor) -> Features:
    """The head's inputs, in pieces that stay in cache. A clone leaves inference mode, so that autograd may read it."""
    family = pooled_family(job)
    vectors = torch.cat([family.features(job.model, piece.clone()) for piece in torch.split(pooled, 4096)])
    return Features(vectors, np.ones(len(pooled), dtype=np.int64))


@torch.no_grad()
def token_features(job: Job, dataset: Dataset) -> Features:
    """Of every token of every row."""
    family = job.family
    assert isinstance(family, TokenFamily)
    lengths = dataset.examples.lengths
    ends = np.cumsum(lengths)
    width = family.head_module(job.model).in_features
    out = torch.zeros(int(lengths.sum()), width, device=job.device.torch_device)
    for chosen, batch in job.shared_batches(dataset.examples, dataset.single_rows):
        values = family.token_vectors(job.model, batch)
        for row, vectors in zip(chosen, values, strict=True):
            out[ends[row] - lengths[row] : ends[row]] = vectors[: lengths[row]]
    sum_over_ranks_([out])
    return Features(out, lengths, of_tokens=True)
