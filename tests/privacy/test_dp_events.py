"""What the plan says equals what the event says, and what the ledger stores reads back exactly."""

from __future__ import annotations

import json

import dp_accounting
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.privacy.dp_events import compose, event_for, from_json, terms, to_json
from app.privacy.plan import GaussianRelease, Part, PrivacyPlan, SampledGaussian
from app.privacy.renyi import Term
from tests.privacy.plans import sampled

sigmas = st.floats(0.05, 1e4)


@st.composite
def part_lists(draw: st.DrawFn) -> tuple[Part, ...]:
    parts: list[Part] = []
    for index in range(draw(st.integers(1, 6))):
        dataset = draw(st.sampled_from(["training", "validation"]))
        if draw(st.booleans()):
            rate = draw(st.one_of(st.just(1.0), st.floats(1e-6, 1.0)))
            steps = draw(st.integers(1, 5000))
            parts.append(SampledGaussian(f"p{index}", rate, steps, draw(sigmas), 1.0, "flat", dataset))
        else:
            parts.append(GaussianRelease(f"p{index}", draw(sigmas), 1.0, dataset))
    return tuple(parts)


def plan_of(parts: tuple[Part, ...], **fields) -> PrivacyPlan:
    return PrivacyPlan("dp_sgd", 1000, parts, target_epsilon=3.0, target_delta=1e-6, **fields)


@given(parts=part_lists())
@settings(deadline=None)
def test_the_event_says_what_the_plan_says(parts: tuple[Part, ...]) -> None:
    for datasets in (("training",), ("validation",), ("training", "validation")):
        said: dict[tuple[float, float], int] = {}
        for part in parts:
            if part.dataset in datasets:
                rate = part.sample_rate if isinstance(part, SampledGaussian) else 1.0
                said[(rate, part.noise_multiplier)] = said.get((rate, part.noise_multiplier), 0) + part.num_steps
        event = event_for(plan_of(parts), datasets=datasets)
        assert {(t.sampling_probability, t.noise_multiplier): t.count for t in terms(event)} == said


@given(parts=part_lists())
@settings(deadline=None)
def test_round_trip_keeps_every_bit(parts: tuple[Part, ...]) -> None:
    event = event_for(parts, datasets=("training", "validation"))
    stored = json.dumps(to_json(event), allow_nan=False)
    assert from_json(json.loads(stored)) == event
    assert json.dumps(to_json(from_json(json.loads(stored)))) == stored


def test_executed_steps_are_what_is_charged() -> None:
    plan = plan_of((GaussianRelease("centring", 20.0, 1.0), sampled("main", 0.1, 100, 2.0)))
    assert terms(event_for(plan.executed({"centring": 1, "main": 40}))) == (Term(0.1, 2.0, 40), Term(1.0, 20.0, 1))
    assert event_for(plan.executed({})) == dp_accounting.NoOpDpEvent()


def test_full_batches_are_plain_gaussians() -> None:
    assert event_for((sampled("main", 1.0, 1, 2.0),)) == dp_accounting.GaussianDpEvent(2.0)


def test_equal_neighbours_are_merged() -> None:
    event = event_for((sampled("a", 0.1, 30, 2.0), sampled("b", 0.1, 70, 2.0)))
    assert event == event_for((sampled("c", 0.1, 100, 2.0),))
    assert compose([event, event]) == event_for((sampled("c", 0.1, 200, 2.0),))


def test_repetitions_of_repetitions_multiply() -> None:
    inner = event_for((sampled("a", 0.1, 30, 2.0),))
    nested = dp_accounting.SelfComposedDpEvent(dp_accounting.ComposedDpEvent([inner, inner]), 5)
    assert terms(nested) == (Term(0.1, 2.0, 300),)
    assert from_json(to_json(nested)) == nested


def test_no_mechanism_no_event() -> None:
    with pytest.raises(ValueError, match="mechanism"):
        event_for(PrivacyPlan("none", 10, ()))


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"type": "laplace", "noise_multiplier": 1.0},
        {"type": "gaussian"},
        {"type": "gaussian", "noise_multiplier": 0.0},
        {"type": "gaussian", "noise_multiplier": float("nan")},
        {"type": "gaussian", "noise_multiplier": "1"},
        {
            "type": "poisson_sampled",
            "sampling_probability": 1.5,
            "event": {"type": "gaussian", "noise_multiplier": 1.0},
        },
        {"type": "self_composed", "count": 0, "event": {"type": "no_op"}},
        {"type": "self_composed", "count": 2.5, "event": {"type": "no_op"}},
        {"type": "composed", "events": 3},
        {"type": "composed", "events": [None]},
    ],
)
def test_a_forged_event_is_refused(stored: dict) -> None:
    with pytest.raises(ValueError, match=r"serialized|must be"):
        from_json(stored)


def test_foreign_events_are_refused() -> None:
    with pytest.raises(ValueError, match="Laplace"):
        terms(dp_accounting.LaplaceDpEvent(1.0))
    with pytest.raises(ValueError, match="NonPrivate"):
        to_json(dp_accounting.NonPrivateDpEvent())
