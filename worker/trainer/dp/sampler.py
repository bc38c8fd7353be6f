"""Who takes part: Poisson batches and held-out splits of units, and which rows a unit of many rows sends.

All of it is drawn from the job's secret key.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from worker.trainer.dp.randomness import ROWS, SAMPLE, SPLIT, JobRandomness

Indices = npt.NDArray[np.int64]


def inclusion_threshold(sample_rate: float) -> int:
    """⌊q · 2⁶⁴⌋, exact: a 64-bit word below it includes its unit, so what is executed never exceeds the accounted q."""
    if not 0.0 < sample_rate <= 1.0:
        raise ValueError("sample_rate must lie in (0, 1]")
    return int(Fraction(sample_rate) * 2**64)


def poisson_batch(randomness: JobRandomness, *, phase: str, step: int, num_units: int, sample_rate: float) -> Indices:
    """The units of one step, ascending: each of `num_units` independently with probability `sample_rate`.

    May be empty, and is never truncated: memory is bounded by splitting it (`batching`), not by leaving units out.
    """
    threshold = inclusion_threshold(sample_rate)
    if threshold == 2**64:
        return np.arange(num_units, dtype=np.int64)
    words = randomness.uniform_u64(num_units, phase=phase, step=step, stream=SAMPLE)
    return np.flatnonzero(words < np.uint64(threshold)).astype(np.int64, copy=False)


def rows_of_step(
    randomness: JobRandomness, rows: Indices, *, unit: int, max_rows: int | None, phase: str, step: int
) -> Indices:
    """At most `max_rows` of a unit's rows for one step, in their order, every such subset equally likely.

    A unit draws from a stream of its own, indexed by its own rows: no other unit's rows can move its choice.
    """
    if max_rows is None or len(rows) <= max_rows:
        return rows
    words = randomness.uniform_u64(len(rows), phase=phase, step=step, stream=ROWS, name=str(unit))
    return rows[np.sort(np.argsort(words, kind="stable")[:max_rows])]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Disjoint unit indices, each ascending, and a receipt: evaluation never sees a unit that was trained on."""

    training: Indices
    held_out: Indices
    digest: str  # SHA-256 over both index lists; stays inside the job, for it would reveal the split


def split_units(randomness: JobRandomness, *, num_units: int, num_held_out: int, phase: str = "split") -> Split:
    """A uniformly random split with exactly `num_held_out` held-out units; ValueError unless 0 ≤ held out < units."""
    if not 0 <= num_held_out < num_units:
        raise ValueError("num_held_out must lie in [0, num_units)")
    words = randomness.uniform_u64(num_units, phase=phase, step=0, stream=SPLIT)
    order = np.argsort(words, kind="stable")
    held_out = np.sort(order[:num_held_out]).astype(np.int64, copy=False)
    training = np.sort(order[num_held_out:]).astype(np.int64, copy=False)
    hasher = hashlib.sha256()
    for part in (training, held_out):
        hasher.update(len(part).to_bytes(8, "big"))
        hasher.update(part.astype("<i8").tobytes())
    return Split(training=training, held_out=held_out, digest=hasher.hexdigest())
