"""Plans as DpEvents: what the accountants consume and the ledger stores.

The event is derived from the plan that the trainer executes, so that accounting and execution cannot drift apart. The
ledger stores events, never ε: `to_json` and `from_json` are exact for every value that a plan can hold.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import groupby
from typing import Any

import dp_accounting
from dp_accounting import DpEvent

from app.privacy.plan import Dataset, Part, PrivacyPlan, SampledGaussian
from app.privacy.renyi import Term

#: Datasets of the budget that the training file belongs to, where nothing else is named.
TRAINING: tuple[Dataset, ...] = ("training",)


def event_for(plan: PrivacyPlan | Iterable[Part], datasets: Collection[Dataset] = TRAINING) -> DpEvent:
    """The event of the parts that touch any of `datasets`: what the budget of that data is charged.

    A plan holds one event for each budget that it touches. Where training and validation rows come from one file, name
    both: no credit is taken for parallel composition of splits. Equal adjacent parts are merged.
    Raises ValueError for a plan without a mechanism: it may only read public data, which no budget covers.
    """
    if isinstance(plan, PrivacyPlan):
        if plan.mechanism == "none":
            raise ValueError("a plan without a mechanism has no event")
        plan = plan.parts
    return compose(_part_event(part) for part in plan if part.dataset in datasets)


def compose(events: Iterable[DpEvent]) -> DpEvent:
    """All the events, one after another; equal neighbours become one repeated event, none at all a NoOp."""
    flat = [entry for event in events for entry in _flatten(event, 1)]
    merged = [
        _repeated(event, sum(count for _, count in run)) for event, run in groupby(flat, key=lambda entry: entry[0])
    ]
    if not merged:
        return dp_accounting.NoOpDpEvent()
    return merged[0] if len(merged) == 1 else dp_accounting.ComposedDpEvent(merged)


def terms(event: DpEvent) -> tuple[Term, ...]:
    """The event as a multiset of Gaussian sums, in a canonical order: two equal results have equal ε.

    Raises ValueError for an event that no plan of ours makes.
    """
    counts: Counter[tuple[float, float]] = Counter()
    for leaf, count in _flatten(event, 1):
        sampling_probability = 1.0
        if isinstance(leaf, dp_accounting.PoissonSampledDpEvent):
            sampling_probability, leaf = leaf.sampling_probability, leaf.event
        if not isinstance(leaf, dp_accounting.GaussianDpEvent):
            raise ValueError(f"no accountant here knows {type(leaf).__name__}")
        counts[(sampling_probability, leaf.noise_multiplier)] += count
    return tuple(Term(q, sigma, count) for (q, sigma), count in sorted(counts.items()))


def to_json(event: DpEvent) -> dict[str, Any]:
    """JSON-ready; floats keep every bit (JSON writes the shortest decimal that reads back the same).

    Raises ValueError for an event that no plan of ours makes.
    """
    match event:
        case dp_accounting.NoOpDpEvent():
            return {"type": "no_op"}
        case dp_accounting.GaussianDpEvent():
            return {"type": "gaussian", "noise_multiplier": event.noise_multiplier}
        case dp_accounting.PoissonSampledDpEvent():
            return {
                "type": "poisson_sampled",
                "sampling_probability": event.sampling_probability,
                "event": to_json(event.event),
            }
        case dp_accounting.SelfComposedDpEvent():
            return {"type": "self_composed", "count": event.count, "event": to_json(event.event)}
        case dp_accounting.ComposedDpEvent():
            return {"type": "composed", "events": [to_json(part) for part in event.events]}
    raise ValueError(f"no JSON form for {type(event).__name__}")


def from_json(data: Mapping[str, Any]) -> DpEvent:
    """Inverse of `to_json`. Raises ValueError on anything else, also on values that no mechanism can have."""
    try:
        match data["type"]:
            case "no_op":
                return dp_accounting.NoOpDpEvent()
            case "gaussian":
                sigma = data["noise_multiplier"]
                if not (isinstance(sigma, float) and 0.0 < sigma < math.inf):
                    raise ValueError("noise_multiplier must be a positive, finite float")
                return dp_accounting.GaussianDpEvent(sigma)
            case "poisson_sampled":
                rate = data["sampling_probability"]
                if not (isinstance(rate, float) and 0.0 < rate < 1.0):
                    raise ValueError("sampling_probability must be a float in (0, 1)")
                return dp_accounting.PoissonSampledDpEvent(rate, from_json(data["event"]))
            case "self_composed":
                count = data["count"]
                if not (type(count) is int and count >= 1):
                    raise ValueError("count must be a positive integer")
                return dp_accounting.SelfComposedDpEvent(from_json(data["event"]), count)
            case "composed":
                return dp_accounting.ComposedDpEvent([from_json(part) for part in data["events"]])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not a serialized event") from error
    raise ValueError("not a serialized event")


def _part_event(part: Part) -> DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(float(part.noise_multiplier))
    if not isinstance(part, SampledGaussian):
        return gaussian
    # Everything is in the batch: no amplification, and the plain Gaussian has a closed form.
    sampled = part.sample_rate < 1.0
    step = dp_accounting.PoissonSampledDpEvent(float(part.sample_rate), gaussian) if sampled else gaussian
    return _repeated(step, part.num_steps)


def _repeated(event: DpEvent, count: int) -> DpEvent:
    return event if count == 1 else dp_accounting.SelfComposedDpEvent(event, count)


def _flatten(event: DpEvent, count: int) -> list[tuple[DpEvent, int]]:
    """The event's leaves (Gaussian, or Poisson-sampled Gaussian) in order, each with how often it happens."""
    match event:
        case dp_accounting.NoOpDpEvent():
            return []
        case dp_accounting.SelfComposedDpEvent():
            return _flatten(event.event, count * event.count)
        case dp_accounting.ComposedDpEvent():
            return [entry for part in event.events for entry in _flatten(part, count)]
    return [(event, count)]
