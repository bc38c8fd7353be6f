"""Poisson sampling: inclusion frequency, independence of units and steps, exact thresholds, no truncation; splits."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from worker.trainer.dp.randomness import JobRandomness
from worker.trainer.dp.sampler import inclusion_threshold, poisson_batch, rows_of_step, split_units

RANDOMNESS = JobRandomness(bytes(range(32)))
UNITS, STEPS, RATE = 200, 3000, 0.05


@pytest.fixture(scope="module")
def included() -> np.ndarray:
    """(steps, units) booleans."""
    result = np.zeros((STEPS, UNITS), dtype=bool)
    for step in range(STEPS):
        drawn = poisson_batch(RANDOMNESS, phase="main", step=step, num_units=UNITS, sample_rate=RATE)
        assert np.all(np.diff(drawn) > 0)
        result[step, drawn] = True
    return result


def test_each_unit_is_included_at_the_rate(included: np.ndarray) -> None:
    counts = included.sum(0)
    std = math.sqrt(STEPS * RATE * (1 - RATE))
    assert np.all(np.abs(counts - STEPS * RATE) < 5 * std)
    chi2 = ((counts - STEPS * RATE) ** 2).sum() / std**2
    assert 1e-4 < stats.chi2.sf(chi2, UNITS) < 1 - 1e-4


def test_batch_sizes_are_binomial(included: np.ndarray) -> None:
    sizes = included.sum(1)
    assert abs(sizes.mean() - UNITS * RATE) < 5 * math.sqrt(UNITS * RATE / STEPS)
    expected = UNITS * RATE * (1 - RATE)
    assert abs(sizes.var() / expected - 1) < 5 * math.sqrt(2 / STEPS)
    assert sizes.max() > 1.5 * UNITS * RATE  # never truncated to the expected size


def test_units_and_steps_are_pairwise_independent(included: np.ndarray) -> None:
    centred = included - included.mean(0)
    correlation = (centred.T @ centred) / STEPS / (RATE * (1 - RATE))
    off_diagonal = correlation[~np.eye(UNITS, dtype=bool)]
    assert np.abs(off_diagonal).max() < 6 / math.sqrt(STEPS)
    consecutive = (centred[1:] * centred[:-1]).sum() / (STEPS * UNITS) / (RATE * (1 - RATE))
    assert abs(consecutive) < 5 / math.sqrt(STEPS * UNITS)


@pytest.mark.parametrize("rate", [0.05, 1 / 3, 1e-9, 0.1, 1.0, 5e-324])
def test_executed_rate_never_exceeds_the_accounted_one(rate: float) -> None:
    threshold = inclusion_threshold(rate)
    assert Fraction(threshold, 2**64) <= Fraction(rate) < Fraction(threshold + 1, 2**64)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, math.nan])
def test_a_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="sample_rate"):
        inclusion_threshold(rate)


def test_rate_one_takes_every_unit() -> None:
    drawn = poisson_batch(RANDOMNESS, phase="main", step=0, num_units=5, sample_rate=1.0)
    assert drawn.tolist() == [0, 1, 2, 3, 4]


def test_batch_may_be_empty() -> None:
    drawn = poisson_batch(RANDOMNESS, phase="main", step=0, num_units=10, sample_rate=1e-12)
    assert drawn.shape == (0,)


def test_a_units_inclusion_does_not_depend_on_history_or_on_other_units() -> None:
    long = poisson_batch(RANDOMNESS, phase="main", step=42, num_units=1000, sample_rate=0.3)
    short = poisson_batch(RANDOMNESS, phase="main", step=42, num_units=500, sample_rate=0.3)
    assert long[long < 500].tolist() == short.tolist()


def test_split_is_exact_disjoint_and_receipted() -> None:
    split = split_units(RANDOMNESS, num_units=1000, num_held_out=100)
    assert len(split.held_out) == 100
    assert sorted([*split.training, *split.held_out]) == list(range(1000))
    again = split_units(RANDOMNESS, num_units=1000, num_held_out=100)
    assert split.digest == again.digest
    other = split_units(JobRandomness(bytes(32)), num_units=1000, num_held_out=100)
    assert split.digest != other.digest
    assert len(split_units(RANDOMNESS, num_units=7, num_held_out=0).held_out) == 0


def test_split_is_uniform() -> None:
    counts = np.zeros(20)
    for key in range(2000):
        randomness = JobRandomness(key.to_bytes(32, "big"))
        counts[split_units(randomness, num_units=20, num_held_out=5).held_out] += 1
    assert stats.chisquare(counts).pvalue > 1e-4


def test_few_rows_of_a_unit_all_take_part() -> None:
    rows = np.array([3, 8, 9])
    for most in (None, 3, 4):
        chosen = rows_of_step(RANDOMNESS, rows, unit=0, max_rows=most, phase="main", step=0)
        assert chosen.tolist() == [3, 8, 9]


def test_a_units_rows_of_a_step_are_any_of_its_subsets_alike() -> None:
    rows = np.array([4, 5, 11, 20, 21])
    seen: dict[tuple[int, ...], int] = dict.fromkeys(combinations(rows.tolist(), 2), 0)
    for step in range(4000):
        seen[tuple(rows_of_step(RANDOMNESS, rows, unit=3, max_rows=2, phase="main", step=step).tolist())] += 1
    assert len(seen) == 10
    assert stats.chisquare(list(seen.values())).pvalue > 1e-4


def test_a_units_choice_is_its_own() -> None:
    """Another unit, phase or key chooses apart; where the rows stand in the file does not matter; a replay is alike."""

    def choose(rows: np.ndarray, *, key: bytes = bytes(range(32)), unit: int = 3, phase: str = "main") -> list[int]:
        return rows_of_step(JobRandomness(key), rows, unit=unit, max_rows=8, phase=phase, step=5).tolist()

    mine = choose(np.arange(100))
    assert choose(np.arange(100)) == mine == [row - 1000 for row in choose(np.arange(1000, 1100))]
    others = (choose(np.arange(100), **other) for other in ({"unit": 4}, {"phase": "head"}, {"key": bytes(32)}))
    assert all(other != mine for other in others)


@pytest.mark.parametrize("held_out", [-1, 10, 11])
def test_split_leaves_units_to_train_on(held_out: int) -> None:
    with pytest.raises(ValueError, match="num_held_out"):
        split_units(RANDOMNESS, num_units=10, num_held_out=held_out)
