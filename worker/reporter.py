"""The release gate of job history: which codes and fields may leave the trainer, and the words that go with them.

It is an allow list. A code that is not on it is dropped, and so is a field that is not, or whose value is not of the
kind that the list names: what remains are numbers that come from the plan, the base model or the machine, and fixed
words. The log says what was dropped by code and field name, never the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlalchemy.orm import Session

from app.catalog.recipes import PART_NAMES
from app.events import service as events
from app.jobs.lifecycle import Claimed
from app.privacy import loss_curve
from app.privacy.plan import PrivacyPlan
from worker.trainer.messages import (
    Checkpoint,
    Failed,
    Finished,
    Message,
    Notice,
    Progress,
    Started,
    Stopped,
    Truncation,
)

log = structlog.get_logger(__name__)

#: At most this many progress events in one attempt: the job's own `progress` is always up to date.
PROGRESS_EVENTS = 20

Check = Callable[[Any], bool]


def number(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def phase(value: Any) -> bool:
    """The name of a part of a plan."""
    return isinstance(value, str) and value in PART_NAMES


def device(value: Any) -> bool:
    """What torch computes on."""
    return value in ("cpu", "cuda")


def steps(value: Any) -> bool:
    """Executed steps of each part of a plan."""
    return isinstance(value, Mapping) and all(phase(name) and number(count) for name, count in value.items())


def interval(value: Any) -> bool:
    """Two finite numbers."""
    return isinstance(value, list) and len(value) == 2 and all(number(end) for end in value)


@dataclass(frozen=True, slots=True)
class Clearance:
    """One code that may leave: its words, and what its fields may hold."""

    message: str
    fields: Mapping[str, Check] = field(default_factory=dict)
    level: events.Level = "info"
    type: events.Type = "message"


#: From the supervisor, and from the trainer's notices.
CLEARED: dict[str, Clearance] = {
    "trainer_started": Clearance(
        "The model is loaded and checked.",
        {
            "device": device,
            "trainable_parameters": number,
            "total_parameters": number,
            "max_physical_batch_tokens": number,
            "threads": number,
            "ranks": number,
        },
    ),
    "progress": Clearance(
        "Step {step} of {num_steps}.",
        {"step": number, "num_steps": number, "phase": phase, "executed": steps},
        type="metrics",
    ),
    "train_loss": Clearance(
        "Step {step} of {total_steps}: training loss {train_loss:.3f}, with noise of {train_loss_noise_std:.3f}.",
        {
            "step": number,
            "total_steps": number,
            "phase": phase,
            "train_loss": number,
            "train_loss_noise_std": number,
            "train_loss_interval_95": interval,
        },
        type="metrics",
    ),
    "checkpoint_committed": Clearance("A checkpoint was kept at step {step}.", {"step": number}),
    "computing_features": Clearance("Features are computed.", {"num_units": number}),
    "slow_gradients": Clearance(
        "Some layers take the slow way to per-record gradients.", {"phase": phase, "parameters": number}, level="warn"
    ),
    "sandbox_unavailable": Clearance(
        "This machine cannot shut the training process off from the network.", level="warn"
    ),
    "files_in_reach": Clearance(
        "This machine cannot shut the training process off from files beside its folder: its kernel has no Landlock.",
        level="warn",
    ),
    "batch_size_reduced": Clearance(
        "Memory ran out: the physical batch is halved (speed only, not privacy).",
        {"max_physical_batch_tokens": number},
        level="warn",
    ),
}


def record(session: Session, claimed: Claimed, code: str, data: Mapping[str, Any]) -> None:
    """Adds what the gate lets through to the job's history; the caller holds the job's row."""
    clearance = CLEARED.get(code)
    if clearance is None:
        # The code itself may be anything: only its length is known to be harmless.
        log.warning("event_dropped", job_id=claimed.job_id)
        return
    released = {
        name: value for name, value in data.items() if name in clearance.fields and clearance.fields[name](value)
    }
    if released.keys() != clearance.fields.keys() or len(released) != len(data):
        log.warning("event_fields_dropped", job_id=claimed.job_id, code=code, count=len(data) - len(released))
        if released.keys() != clearance.fields.keys():
            return
    events.record(
        session,
        project_id=claimed.project_id,
        job_id=claimed.job_id,
        code=code,
        message=clearance.message.format(**released),
        level=clearance.level,
        type=clearance.type,
        data=released or None,
    )


def record_losses(
    session: Session, claimed: Claimed, points: Sequence[Mapping[str, Any]], known: Mapping[str, int]
) -> None:
    """Adds the points of the loss curve that a checkpoint completes, in the transaction that commits it.

    known: executed steps of the checkpoint before: no point within them is told again.
    """
    plan = claimed.plan
    planned = {part.name: part.num_steps for part in plan.parts}
    for point in points:
        if not loss_curve.is_point(plan, point, planned, known):
            log.warning("event_dropped", job_id=claimed.job_id)
            continue
        told = {**loss_curve.described(plan, point), "total_steps": sum(planned.values())}
        record(session, claimed, "train_loss", told)


class NotOfThePlan(ValueError):
    """A message holds what no trainer of this plan can have to say."""


def check(message: Message, plan: PrivacyPlan) -> None:
    """What every message of a trainer must be before anything is made of it. Raises NotOfThePlan.

    Counts are whole numbers within the plan: they become ledger charges, rows that users read, and storage keys.
    """
    match message:
        case Started(device=on, threads=threads, ranks=ranks):
            sound = device(on) and _count(threads) and threads > 0 and _count(ranks) and ranks > 0
        case Progress():
            sound = (
                message.phase in {part.name for part in plan.parts}
                and message.num_steps == sum(part.num_steps for part in plan.parts)
                and _planned(plan, message.step, message.executed)
            )
        case Truncation(dataset, rows, tokens, cut):
            sound = dataset in ("training", "validation") and _count(rows) and _count(tokens) and _cut(cut)
        case Checkpoint(step, executed, losses):
            sound = _planned(plan, step, executed) and _points(plan, losses, executed)
        case Stopped(step, executed):
            sound = _planned(plan, step, executed)
        case Finished(executed):
            sound = _planned(plan, None, executed)
        case Failed(code):
            sound = isinstance(code, str)
        case Notice(code, data):
            sound = isinstance(code, str) and isinstance(data, Mapping)
        case _:
            sound = True
    if not sound:
        raise NotOfThePlan(message.type)


def _planned(plan: PrivacyPlan, step: Any, executed: Any) -> bool:
    """Whether each count belongs to a part and stays within it, and `step` (None: not told) is their sum."""
    if not isinstance(executed, Mapping) or not all(_count(count) for count in executed.values()):
        return False
    try:
        plan.executed(executed)
    except ValueError:
        return False
    named = executed.keys() <= {part.name for part in plan.parts}
    return named and (step is None or (_count(step) and step == sum(executed.values())))


def _points(plan: PrivacyPlan, losses: Any, executed: Mapping[str, int]) -> bool:
    """Whether each point is one of the plan's loss curve, and all of its steps are executed."""
    return isinstance(losses, list | tuple) and all(
        isinstance(point, Mapping) and loss_curve.is_point(plan, point, executed, {}) for point in losses
    )


def _cut(cut: Any) -> bool:
    """Whether it names sides of a record with two counts each."""
    return (
        isinstance(cut, Mapping)
        and cut.keys() <= {"text", "tokens", "source", "target", "chat"}
        and all(
            isinstance(side, Mapping) and side.keys() == {"rows", "tokens"} and all(map(_count, side.values()))
            for side in cut.values()
        )
    )


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class ProgressEvents:
    """Thins progress out to a few events an attempt: evenly over its steps, the last included, and one as each phase
    begins."""

    def __init__(self) -> None:
        self._last, self._step = ("", -1), -1

    def due(self, message: Progress) -> bool:
        """Whether this one becomes an event."""
        place = (message.phase, message.step * PROGRESS_EVENTS // max(message.num_steps, 1))
        if place == self._last or message.step <= self._step:  # told again, by one that waits for its next phase
            return False
        self._last, self._step = place, message.step
        return True


def progress(message: Progress) -> dict[str, Any]:
    """As the job's row keeps it."""
    return {
        "step": message.step,
        "num_steps": message.num_steps,
        "phase": message.phase,
        "executed": dict(message.executed),
    }
