"""The loss curve's points: whose steps they are, when they are complete, how far they may be off."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from app.privacy import loss_curve
from app.privacy.plan import GaussianRelease, LossSum, PrivacyPlan, QuantileSum, SampledGaussian

BOUND = 2.0

#: More noise than any plan here asks for.
STDS = {"head": 9.0, "main": 9.0}


def part(name: str = "main", steps: int = 160, sigma: float = 3.0, rate: float = 1 / 8) -> SampledGaussian:
    return SampledGaussian(name, rate, steps, sigma, 1.0, "automatic", loss=LossSum(BOUND, 1 / 64))


def plan(*parts: SampledGaussian, num_units: int = 10_000) -> PrivacyPlan:
    centring = GaussianRelease("centring", 20.0, 1.0)
    return PrivacyPlan("dp_sgd", num_units, (centring, *parts), target_epsilon=3.0, target_delta=1e-5)


def test_one_steps_noise_is_its_share_of_the_plans() -> None:
    """(Δ / s)² is the share of σ⁻²; the mean divides by q · N."""
    of_sum = loss_curve.noise_std(plan(part()), part()) * 10_000 / 8
    assert (BOUND / 2 / of_sum) ** 2 == pytest.approx(3.0**-2 / 64)


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 50, 51, 160, 1001, 100_000])
@pytest.mark.parametrize("num_units", [10, 500, 10_000, 10_000_000])
def test_every_step_is_in_one_point(steps: int, num_units: int) -> None:
    made = part(steps=steps)
    ends = loss_curve.window_ends(plan(made, num_units=num_units), made)
    assert ends == sorted(set(ends))
    assert ends[-1] == steps
    assert min(steps, 8) <= len(ends) <= max(50, 8)


def test_windows_are_as_wide_as_the_noise_calls_for() -> None:
    wide, narrow = (part(steps=1000), part(steps=1000))
    noisy, quiet = plan(wide, num_units=700), plan(narrow, num_units=1_000_000)
    assert len(loss_curve.window_ends(quiet, narrow)) == 50
    ends = loss_curve.window_ends(noisy, wide)
    assert 8 <= len(ends) < 50
    std = loss_curve.noise_std(noisy, wide) / math.sqrt(ends[0])
    assert std <= loss_curve.READABLE * BOUND < std * math.sqrt(ends[0] / (ends[0] - 1))


def test_points_come_once_and_only_when_complete() -> None:
    first, second = part("head", steps=16), part("main", steps=16)
    made = plan(first, second, num_units=100)
    losses = {"head": [1.0, 3.0] * 8, "main": [0.5, 0.7, 0.9]}
    points = loss_curve.points(made, losses, STDS)
    assert [(point["phase"], point["step"]) for point in points] == [
        *(("head", 1 + end) for end in range(2, 17, 2)),
        ("main", 19),
    ]
    assert {point["train_loss"] for point in points[:-1]} == {2.0}
    assert points[-1]["train_loss"] == pytest.approx(0.6)
    # What a checkpoint at step 3 of `head` has told, and what the next one adds: all of it, nothing twice.
    told = loss_curve.points(made, {"head": losses["head"][:3]}, STDS)
    rest = loss_curve.points(made, losses, STDS, after={"head": 3})
    assert told + rest == points
    assert all(loss_curve.is_point(made, point, {"head": 16, "main": 3}, {"head": 3}) for point in rest)
    assert not any(loss_curve.is_point(made, point, {"head": 16, "main": 3}, {"head": 3}) for point in told)


@pytest.mark.parametrize(
    "change",
    [
        {"phase": "centring"},
        {"phase": "other"},
        {"phase": None},
        {"step": 20},
        {"step": 2.0},
        {"step": True},
        {"train_loss": math.nan},
        {"train_loss": math.inf},
        {"train_loss": "1"},
        {"exact": 0.3},
        {"train_loss_noise_std": 1e-3},
        {"train_loss_noise_std": math.inf},
    ],
)
def test_what_is_no_point_of_the_plan(change: dict[str, object]) -> None:
    made = plan(part())
    executed = {"centring": 1, "main": 160}
    point = loss_curve.points(made, {"main": [1.0] * 160}, STDS)[0]
    assert loss_curve.is_point(made, point, executed, {})
    assert not loss_curve.is_point(made, {**point, **change}, executed, {})
    assert not loss_curve.is_point(made, point, {"main": 3}, {})
    bare = dataclasses.replace(part(), loss=None)
    assert not loss_curve.is_point(plan(bare), point, executed, {})


def test_the_interval_holds_the_truth() -> None:
    """Simulated from the definition: losses of all units, Poisson batches, noise of the plan."""
    rng = np.random.default_rng(3)
    made = part(steps=40)
    of = plan(made, num_units=800)
    losses = rng.beta(0.6, 1.4, 800) * BOUND
    inside, points = 0, 0
    for _ in range(60):
        drawn = rng.random((40, 800)) < made.sample_rate
        noise = rng.normal(0.0, loss_curve.noise_std(of, made), 40)
        steps = BOUND / 2 + (drawn * (losses - BOUND / 2)).sum(1) / (800 / 8) + noise
        for point in loss_curve.points(of, {"main": steps.tolist()}, {"main": loss_curve.noise_std(of, made)}):
            told = loss_curve.described(of, point)
            low, high = told["train_loss_interval_95"]
            inside += low <= losses.mean() <= high
            points += 1
            assert 0.0 <= low <= told["train_loss"] <= high <= BOUND
    assert inside / points >= 0.95
    assert inside / points < 1.0  # or the interval is no statement


def test_plans_without_a_curve_keep_the_digest_that_they_had() -> None:
    old = SampledGaussian("main", 0.01, 1000, 1.0, 1.0, "flat")
    made = PrivacyPlan("dp_sgd", 1000, (old,), target_epsilon=3.0, target_delta=1e-5)
    assert made.to_dict()["parts"][0].keys() == {
        "name", "sample_rate", "num_steps", "noise_multiplier", "max_grad_norm", "clipping", "dataset", "kind",
    }  # fmt: skip
    assert made.digest() == "e2f795a2819592328cf295ac374addfb29b3f03df4bc6aec30ea976757f0c8d4"
    assert PrivacyPlan.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    "broken",
    [
        lambda: LossSum(0.0, 0.1),
        lambda: LossSum(math.inf, 0.1),
        lambda: LossSum(1.0, 0.0),
        lambda: LossSum(1.0, 0.5),
        lambda: QuantileSum(0.1, 1.0, 0.2),
        lambda: QuantileSum(0.1, 0.5, 0.0),
        lambda: dataclasses.replace(part(), clipping="adaptive"),
        lambda: dataclasses.replace(part(), quantile=QuantileSum(0.1, 0.5, 0.2)),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(broken) -> None:
    with pytest.raises(ValueError, match=r"share|bound|quantile"):
        broken()
