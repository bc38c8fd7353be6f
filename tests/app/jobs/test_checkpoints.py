"""After which steps a checkpoint is published."""

from __future__ import annotations

import pytest

from app.jobs.checkpoints import steps
from app.privacy.plan import GaussianRelease, Part, PrivacyPlan, SampledGaussian


def _plan(*phases: int, centring: bool = True) -> PrivacyPlan:
    parts: list[Part] = [GaussianRelease("centring", 5.0, 1.0)] if centring else []
    parts += [SampledGaussian(f"phase-{n}", 0.1, steps, 1.0, 1.0, "flat") for n, steps in enumerate(phases)]
    return PrivacyPlan(
        mechanism="dp_sgd",
        num_units=100,
        parts=(*parts, GaussianRelease("evaluation", 2.0, 1.0)),
        target_epsilon=1.0,
        target_delta=1e-5,
    )


@pytest.mark.parametrize(
    ("plan", "count", "expected"),
    [
        (_plan(100), 0, []),
        (_plan(100, centring=False), 1, [50]),
        (_plan(100), 1, [51]),
        (_plan(40, 60), 3, [26, 51, 76]),
        (_plan(2), 20, [2]),
        (_plan(1), 20, []),
    ],
)
def test_they_cut_the_training_into_equal_pieces(plan: PrivacyPlan, count: int, expected: list[int]) -> None:
    assert steps(plan, count) == expected
