"""What a head reads of a frozen body, computed once for all rows. Private: it stays in memory, in no checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from app.catalog.memory import MOST_FEATURE_BYTES
from worker.trainer.data import Dataset
from worker.trainer.dp.reduce import sum_over_ranks_
from worker.trainer.families.interface import TokenFamily
from worker.trainer.job import Job, pooled_family
from worker.trainer.tasks.examples import Indices


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """vectors: (rows, width); of tokens (kept tokens, width), row behind row. lengths: (rows,), what a row takes of a
    physical batch. again: where a row has a vector for each of its tokens, the body's pass over rows that are not kept,
    (rows, longest, width)."""

    vectors: Tensor
    lengths: npt.NDArray[np.int64]
    again: Callable[[Indices], Tensor] | None = None

    def of_rows(self, rows: Indices) -> Tensor:
        """(rows, width), or (rows, longest, width), zero where a row has no token."""
        chosen = np.asarray(rows, dtype=np.int64)
        if self.again is None:
            return self.vectors[torch.from_numpy(chosen).to(self.vectors.device)]
        ends = np.cumsum(self.lengths)
        pieces = [self.vectors[ends[row] - self.lengths[row] : ends[row]] for row in chosen]
        missing = np.flatnonzero(ends[chosen] > len(self.vectors))
        if len(missing):
            for place, values in zip(missing, self.again(chosen[missing]), strict=True):
                pieces[place] = values[: self.lengths[chosen[place]]]
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
    """Of every token of the first rows, as many as may be kept; of the others whenever a step draws them."""
    family = job.family
    assert isinstance(family, TokenFamily)
    lengths = dataset.examples.lengths
    ends = np.cumsum(lengths)
    width = family.head_module(job.model).in_features
    kept = int(np.searchsorted(ends, MOST_FEATURE_BYTES // (4 * width), side="right"))
    out = torch.zeros(int(lengths[:kept].sum()), width, device=job.device.torch_device)
    for chosen, batch in job.shared_batches(dataset.examples, dataset.single_rows[:kept]):
        values = family.token_vectors(job.model, batch)
        for row, vectors in zip(chosen, values, strict=True):
            out[ends[row] - lengths[row] : ends[row]] = vectors[: lengths[row]]
    sum_over_ranks_([out])

    @torch.no_grad()
    def again(rows: Indices) -> Tensor:
        return family.token_vectors(job.model, job.task.batch(dataset.examples, rows, job.device.torch_device))

    return Features(out, lengths, again)
