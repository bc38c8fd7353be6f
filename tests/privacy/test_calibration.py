"""Calibrated noise is on the safe side of its target, close to it, the same every time, and quick to find."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.privacy import calibration
from app.privacy.accountants import pld_epsilon, rdp_epsilon
from app.privacy.calibration import TOLERANCE, CannotCalibrate, calibrate, gaussian_noise_multiplier
from app.privacy.dp_events import event_for
from app.privacy.plan import GaussianRelease
from tests.privacy import oracles
from tests.privacy.plans import head, sampled, warm_then_body


def only(rate: float, steps: int):
    return lambda sigma: (sampled("main", rate, steps, sigma),)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    calibration.clear_cache()


@pytest.mark.parametrize("target", [0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize(
    "build",
    [
        head,
        warm_then_body,
        only(1 / 8, 160),
        only(512 / 6920, 60),
        only(0.01, 3000),
        only(1325 / 10605, 160),
        only(1, 1),
    ],
)
def test_the_certificate_is_below_the_target_and_near_it(build, target: float) -> None:
    found = calibrate(build, target, 1e-6)
    assert (1 - TOLERANCE) * target <= found.epsilon <= target
    assert found.parts == build(found.scale)
    # The same figure from the stated accountant, and no other one contradicts it.
    again = pld_epsilon(event_for(found.parts), 1e-6, discretization=found.discretization)
    assert found.epsilon - 1e-6 <= again.epsilon <= found.epsilon
    assert found.accountant == again.accountant
    assert pld_epsilon(event_for(found.parts), 1e-6, discretization=5e-5).epsilon <= target
    assert rdp_epsilon(event_for(found.parts), 1e-6) >= found.epsilon * (1 - 0.002)


@given(
    rate=st.floats(1e-3, 1.0),
    steps=st.integers(1, 2000),
    target=st.floats(0.1, 20.0),
    delta=st.sampled_from([1e-8, 1e-5]),
)
@settings(max_examples=25, deadline=None)
def test_any_sensible_plan_calibrates(rate: float, steps: int, target: float, delta: float) -> None:
    found = calibrate(only(rate, steps), target, delta)
    assert found.epsilon <= target
    assert found.epsilon >= (1 - TOLERANCE) * target or found.scale <= calibration.MIN_SCALE + 1e-4


def test_a_stricter_target_takes_more_noise() -> None:
    scales = [calibrate(head, target, 1e-6).scale for target in (8.0, 4.0, 2.0, 1.0)]
    assert scales == sorted(scales)
    assert calibrate(head, 2.0, 1e-8).scale > scales[2]


def test_the_same_question_has_the_same_answer() -> None:
    first = calibrate(warm_then_body, 3.0, 1e-6)
    calibration.clear_cache()
    assert calibrate(warm_then_body, 3.0, 1e-6) == first


def test_a_repeated_question_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = calibrate(head, 3.0, 1e-6)
    monkeypatch.setattr(calibration, "pld_epsilon", None)
    assert calibrate(lambda sigma: head(sigma), 3.0, 1e-6) is first
    with pytest.raises(TypeError):
        calibrate(head, 3.0, 2e-6)


def test_the_cache_never_answers_another_question() -> None:
    """Two builds that agree wherever the cache looked, and differ at the answer."""

    def crooked(sigma: float):
        return head(sigma) if sigma in (1.0, 3.7) else warm_then_body(sigma)

    plain = calibrate(head, 3.0, 1e-6)
    bent = calibrate(crooked, 3.0, 1e-6)
    assert bent.parts == warm_then_body(bent.scale)
    assert bent.epsilon <= 3.0
    assert plain.parts == head(plain.scale)


@pytest.mark.parametrize("target", [0.2, 0.05])
def test_fixed_parts_that_are_too_much_are_refused(target: float) -> None:
    with pytest.raises(CannotCalibrate):
        calibrate(lambda sigma: (sampled("main", 0.1, 10, sigma), GaussianRelease("centring", 2.0, 1.0)), target, 1e-6)


def test_fixed_parts_that_only_pld_can_fit() -> None:
    """RDP says that the fixed release alone is too much; the exact accountant still finds room."""
    release = GaussianRelease("centring", gaussian_noise_multiplier(0.98, 1e-6), 1.0)

    def build(sigma: float):
        return (release, sampled("main", 0.1, 10, sigma))

    assert rdp_epsilon(event_for((release,)), 1e-6) > 1.0
    found = calibrate(build, 1.0, 1e-6)
    assert 0.98 < found.epsilon <= 1.0


def test_parts_of_another_dataset_are_not_counted() -> None:
    public_split = dataclasses.replace(head(1.0)[-1], noise_multiplier=0.1, dataset="validation")

    def build(sigma: float):
        return (*head(sigma)[:-1], public_split)

    found = calibrate(build, 3.0, 1e-6)
    assert found.scale == calibrate(lambda sigma: head(sigma)[:-1], 3.0, 1e-6).scale
    assert found.parts[-1] == public_split
    with pytest.raises(CannotCalibrate):
        calibrate(build, 3.0, 1e-6, datasets=("validation",))


def test_an_enormous_target_keeps_the_least_noise() -> None:
    found = calibrate(only(0.1, 10), 500.0, 1e-6)
    assert found.scale == calibration.MIN_SCALE
    assert found.epsilon < 500.0


@pytest.mark.parametrize("target", [0.0, -1.0, float("inf"), float("nan")])
def test_a_target_without_meaning_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target_epsilon"):
        calibrate(head, target, 1e-6)
    with pytest.raises(ValueError, match="epsilon"):
        gaussian_noise_multiplier(target, 1e-6)


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9])
def test_one_release_against_quadrature(epsilon: float, delta: float) -> None:
    sigma = gaussian_noise_multiplier(epsilon, delta)
    assert oracles.gaussian_delta(sigma, epsilon) <= delta * (1 + 1e-7)
    assert oracles.gaussian_delta(sigma * 0.999, epsilon) > delta
    if epsilon <= 1.0:  # the classical formula holds there, and wastes noise
        assert sigma < (2 * math.log(1.25 / delta)) ** 0.5 / epsilon
