"""What a head reads of a frozen body, computed once for all rows. Private: it stays in memory, in no checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from app.catalog.memory import MOST_FEATURE_BYTES
from worker.trainer.adaptations.temperature import ScaledLinear
from worker.trainer.data import Dataset
from worker.trainer.dp.batching import physical_batches
from worker.trainer.dp.reduce import sum_over_ranks_
from worker.trainer.families.interface import AttentiveFamily, TokenFamily
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

    def of_rows(self, rows: Indices) -> dict[str, Tensor]:
        """features: (rows, width), or (rows, longest, width), zero where a row has no token; then also mask, (rows,
        longest), where it has one."""
        chosen = np.asarray(rows, dtype=np.int64)
        if self.again is None:
            return {"features": self.vectors[torch.from_numpy(chosen).to(self.vectors.device)]}
        ends = np.cumsum(self.lengths)
        pieces = [self.vectors[ends[row] - self.lengths[row] : ends[row]] for row in chosen]
        missing = np.flatnonzero(ends[chosen] > len(self.vectors))
        if len(missing):
            for place, values in zip(missing, self.again(chosen[missing]), strict=True):
                pieces[place] = values[: self.lengths[chosen[place]]]
        padded, lengths = nn.utils.rnn.pad_sequence(pieces, batch_first=True), torch.from_numpy(self.lengths[chosen])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        return {"features": padded, "mask": mask.to(padded.device)}


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
    """The head's inputs."""
    return _of_pieces(job, pooled, nn.Identity())


def _of_pieces(job: Job, pooled: Tensor, read: Callable[[Tensor], Tensor]) -> Features:
    """What is read of the head's inputs, in pieces that stay in cache. A clone leaves inference mode, so that autograd
    may read it."""
    family = pooled_family(job)
    vectors = torch.cat([read(family.features(job.model, piece.clone())) for piece in torch.split(pooled, 4096)])
    return Features(vectors, np.ones(len(pooled), dtype=np.int64))


def scaled_head(job: Job) -> ScaledLinear:
    """The head of a job with a phase that scales it."""
    head = pooled_family(job).head_module(job.model)
    assert isinstance(head, ScaledLinear)
    return head


@torch.no_grad()
def logits(job: Job, dataset: Dataset) -> Features:
    """The head's, (rows, classes), not scaled, of the weights of now. A collective, as `attended_vectors`."""
    return _of_pieces(job, pooled_vectors(job, dataset), scaled_head(job).unscaled)


@torch.no_grad()
def attended_vectors(job: Job, tokens: Features) -> Tensor:
    """`pooled_vectors` from the tokens' states, without another pass of the body; of rows that are not kept, with one.

    A collective: raises StopRequested on every rank, before a batch, once the supervisor asked for it.
    """
    assert isinstance(job.family, AttentiveFamily)
    head = job.family.attentive_head(job.model)
    rows = [[row] for row in range(len(tokens.lengths))]
    out = torch.zeros(len(rows), tokens.vectors.shape[1], device=tokens.vectors.device)
    for chosen in physical_batches(rows, tokens.lengths, max_tokens=job.spec.runtime.max_physical_batch_tokens):
        job.control.check()  # every rank makes all of them
        batch = tokens.of_rows(chosen)
        out[torch.from_numpy(chosen).to(out.device)] = head.pooled(batch["features"], batch["mask"])
    return out


@torch.no_grad()
def token_features(job: Job, dataset: Dataset) -> Features:
    """Of every token of the first rows, as many as may be kept; of the others whenever a step draws them."""
    family = job.family
    assert isinstance(family, AttentiveFamily | TokenFamily)
    vectors_of = family.states if isinstance(family, AttentiveFamily) else family.token_vectors
    lengths = dataset.examples.lengths
    ends = np.cumsum(lengths)
    width = family.head_module(job.model).in_features
    most = min(MOST_FEATURE_BYTES, job.most_feature_bytes)
    kept = int(np.searchsorted(ends, most // (4 * width), side="right"))
    out = torch.zeros(int(lengths[:kept].sum()), width, device=job.device.torch_device)
    for chosen, batch in job.shared_batches(dataset.examples, dataset.single_rows[:kept]):
        values = vectors_of(job.model, batch)
        for row, vectors in zip(chosen, values, strict=True):
            out[ends[row] - lengths[row] : ends[row]] = vectors[: lengths[row]]
    sum_over_ranks_([out])

    @torch.no_grad()
    def again(rows: Indices) -> Tensor:
        return vectors_of(job.model, job.task.batch(dataset.examples, rows, job.device.torch_device))

    return Features(out, lengths, again)
