"""A job in a worker's hands: claim, heartbeat, checkpoint, end. All the SQL that the supervisor needs.

A claim is a lease with a fence, a number that rises with each claim. Every write here is guarded by an UPDATE on fence
and status: zero rows mean that the job was taken over, cancelled or ended; nothing was written, LeaseLost is raised.
Lease times come from the database's clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.budgets import service as budgets
from app.db.base import now
from app.db.lease import LeaseLost as LeaseLost
from app.events import service as events
from app.exports import service as exports
from app.jobs import checkpoints, keys, settlement
from app.jobs.failures import failure
from app.jobs.tables import Job
from app.models import service as models
from app.privacy.plan import PrivacyPlan
from app.settings import Settings

#: Who settles, in the ledger's words.
WORKER, SWEEP = "worker", "sweep"

#: A sweep hints at this many queued jobs, oldest first, and at one job no oftener than this.
REHINT_JOBS = 50
REHINT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Claimed:
    """What an attempt needs to know. request, charges, resolved, checkpoint, runtime: as in `tables.Job`.

    published: where the store has what the job published so far.
    """

    job_id: str
    project_id: str
    fence: int
    attempt: int
    model: str
    suffix: str | None
    seed: int
    training_file_id: str
    validation_file_id: str | None
    request: Mapping[str, Any]
    plan: PrivacyPlan
    charges: Sequence[Mapping[str, Any]]
    resolved: Mapping[str, Any]
    checkpoint: Mapping[str, Any] | None
    runtime: Mapping[str, Any] | None
    started_at: float
    cancel_requested: bool
    published: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Beat:
    """The answer to a heartbeat."""

    cancel_requested: bool


def claim(session: Session, job_id: str, worker: str, lease_seconds: float) -> Claimed | None:
    """Takes a queued job: a new fence, one attempt more, a lease. None where another took it or it is not queued.

    Nor where a budget of it is locked; and one that a reconciliation charged fails here. Before, `heads.may_start`.
    """
    standing = budgets.standing(session, job_id)
    if standing == "locked":
        return None
    job = session.scalars(
        update(Job)
        .where(Job.id == job_id, Job.status == "queued")
        .values(
            status="running",
            fence=Job.fence + 1,
            rows_withheld=Job.fence + 1,
            attempts=Job.attempts + 1,
            worker=worker,
            lease_expires_at=now() + lease_seconds,
        )
        .returning(Job)
        .execution_options(populate_existing=True)
    ).one_or_none()
    if job is None:
        return None
    if standing == "charged":
        settlement.settle(session, job, "failed", executed=None, actor=WORKER, error=failure("budget_reconciled"))
        return None
    if job.started_at is None:
        job.started_at = session.scalars(select(now())).one()
        session.flush()
    events.record(
        session,
        project_id=job.project_id,
        job_id=job.id,
        code="job_started",
        message="Training started." if job.attempts == 1 else "Training was taken up again.",
        data={"attempt": job.attempts},
    )
    assert job.plan is not None
    assert job.resolved is not None
    return Claimed(
        job_id=job.id,
        project_id=job.project_id,
        fence=job.fence,
        attempt=job.attempts,
        model=job.model,
        suffix=job.suffix,
        seed=job.seed,
        training_file_id=job.training_file_id,
        validation_file_id=job.validation_file_id,
        request=job.request,
        plan=PrivacyPlan.from_dict(job.plan),
        charges=job.charges,
        resolved=job.resolved,
        checkpoint=job.checkpoint,
        runtime=job.runtime,
        started_at=job.started_at,
        cancel_requested=job.cancel_requested,
        published=models.stored_by(session, job.id),
    )


def heartbeat(
    session: Session, job_id: str, fence: int, lease_seconds: float, progress: Mapping[str, Any] | None = None
) -> Beat:
    """Renews the lease and tells whether the user cancelled. progress: {step, num_steps, phase, executed}."""
    job = _guarded(session, job_id, fence, lease_expires_at=now() + lease_seconds)
    if progress is not None:
        _note_progress(session, job, progress)
    return Beat(cancel_requested=job.cancel_requested)


def give_rows(session: Session, job_id: str, fence: int, lease_seconds: float) -> None:
    """Renews the lease, and notes that the attempt may read rows now. Before its trainer has them: one that is lost
    without this note has read none."""
    _guarded(session, job_id, fence, lease_expires_at=now() + lease_seconds, rows_withheld=None)


def allow(session: Session, job_id: str, fence: int, lease_seconds: float, step: int) -> None:
    """Renews the lease, and notes that the attempt may execute steps up to this one now, counted over all parts.

    Before it is told so: once its worker has fallen silent, this is how far it may have come, whatever it told last.
    """
    job = _guarded(session, job_id, fence, lease_expires_at=now() + lease_seconds)
    known = job.progress or {}
    job.progress = {**known, "allowed": max(known.get("allowed", 0), step)}
    session.flush()


def freeze_runtime(
    session: Session, job_id: str, fence: int, runtime: Mapping[str, Any], *, replace: bool = False
) -> Mapping[str, Any]:
    """Fixes the runtime options at the first attempt; later ones get the first's back.

    replace: once the trainer says what `auto` and 0 came to on its machine, and after an out-of-memory: nothing else
    changes them.
    """
    job = _guarded(session, job_id, fence)
    if job.runtime is None or replace:
        job.runtime = dict(runtime)
        session.flush()
    return job.runtime


def commit_checkpoint(
    session: Session,
    job_id: str,
    fence: int,
    checkpoint: Mapping[str, Any],
    model_fields: Mapping[str, Any] | None = None,
) -> Mapping[str, Any] | None:
    """Moves the pointer to a checkpoint {key, step, executed, files} that is stored completely; returns the one before.

    Only from here on may what its steps gave leave the service: none of them will ever be executed again.
    model_fields: as in `succeed`, where the checkpoint is one that can be taken: it is published with the pointer.
    Raises ValueError where it does not lie ahead of the one before.
    """
    job = _guarded(session, job_id, fence)
    previous = job.checkpoint
    if previous is not None and checkpoint["step"] <= previous["step"]:
        raise ValueError("a checkpoint lies ahead of the one before")
    PrivacyPlan.from_dict(job.plan or {}).executed(checkpoint["executed"])  # raises for steps the plan does not have
    job.checkpoint = {**checkpoint, "fence": fence}
    if checkpoint["step"] >= (job.progress or {}).get("crashed_at", 0):
        job.interrupted = False  # from here on, all that the lost attempt may have executed is charged anyway
    session.flush()
    if model_fields is not None:
        checkpoints.publish(session, job, checkpoint["step"], model_fields, WORKER)
    return previous


def succeed(
    session: Session, job_id: str, fence: int, executed: Mapping[str, int], model_fields: Mapping[str, Any]
) -> str:
    """Settles a finished job and publishes its model; returns the model's id.

    model_fields: storage_prefix, files, archives, metrics and privacy_report, for `models.service.publish`.
    Raises ValueError where a step of the plan is missing: then the job has not finished.
    """
    job = _guarded(session, job_id, fence)
    if dict(executed) != settlement.planned_steps(job):
        raise ValueError("a finished job has executed its whole plan")
    model = models.publish(
        session, project_id=job.project_id, job_id=job.id, base=job.model, suffix=job.suffix, **model_fields
    )
    job.fine_tuned_model = model.id
    if "export" in job.request:
        exports.request_all(session, model, job.request["export"])
    settlement.settle(session, job, "succeeded", executed=executed, actor=WORKER)
    return model.id


def cancel_running(session: Session, job_id: str, fence: int, executed: Mapping[str, int]) -> None:
    """Ends a job that its user cancelled. executed: every step that was executed, released or not.

    While an attempt before crashed further on than this one has kept, a cancel is charged as the crash is: in full.
    """
    job = _guarded(session, job_id, fence)
    settlement.settle(session, job, "cancelled", executed=None if job.interrupted else executed, actor=WORKER)


def fail(session: Session, job_id: str, fence: int, code: str, *, rows_read: bool = True) -> None:
    """Ends a job that failed, charged in full: why it failed may depend on private rows. code: one of `failures`.

    rows_read: False where the attempt ended before its trainer looked at one, so that it depends on none: charged is
    what attempts before are known to have executed, and in full where one of them did not say.
    """
    job = _guarded(session, job_id, fence)
    settlement.settle(session, job, "failed", executed=_known(job, rows_read), actor=WORKER, error=failure(code))


def requeue(session: Session, job_id: str, fence: int, executed: Mapping[str, int] | None = None) -> None:
    """Gives the job back, at a graceful stop of the worker: the attempt does not count.

    executed: what had been executed, as far as is known; without it, a cancel before the next claim is charged in full.
    """
    job = _guarded(session, job_id, fence, attempts=Job.attempts - 1)
    _release(session, job, interrupted=executed is None)
    if executed is not None:
        known = job.progress or {}
        job.progress = {**known, "executed": settlement.at_least(executed, known.get("executed", {}))}
        session.flush()


def abandon(
    session: Session, job_id: str, fence: int, settings: Settings, code: str, *, rows_read: bool = True
) -> bool:
    """Gives the job back after a crash of its trainer: the attempt counts. Whether it is queued again, for a hint.

    Where the attempts are used up, or the user has cancelled, it ends as `sweep` says. code: of that failure.
    rows_read: as in `fail`.
    """
    return _take_back(session, _guarded(session, job_id, fence), settings, WORKER, code, rows_read=rows_read)


def sweep(session: Session, settings: Settings) -> list[str]:
    """Takes jobs from workers that fell silent; returns the ids of queued jobs to hint at.

    An expired lease goes back to the queue. Where the attempts are used up, the job fails; where its user has
    cancelled meanwhile, it ends: both charged in full, since a crash may depend on private rows; but as `fail` says
    where the attempt had not been given them.
    """
    expired = session.scalars(
        select(Job)
        .where(Job.status == "running", Job.lease_expires_at < now())
        .order_by(Job.id)
        .with_for_update(skip_locked=True, key_share=True)
        .execution_options(populate_existing=True)
    ).all()
    for job in expired:
        _take_back(session, job, settings, SWEEP, "worker_lost", rows_read=job.rows_withheld != job.fence)
    return list(_to_hint(session, settings))


def job_key(session: Session, job_id: str, secret: bytes) -> bytes:
    """The job's secret bytes, for the trainer's standard input. Raises keys.KeyUnavailable."""
    job = session.get(Job, job_id)
    if job is None:
        raise keys.KeyUnavailable("no such job")
    return keys.unwrap(session, job, secret)


def _guarded(session: Session, job_id: str, fence: int, **values: Any) -> Job:
    """The running job of that fence, its row locked and updated; LeaseLost, and nothing written, without one."""
    job = session.scalars(
        update(Job)
        .where(Job.id == job_id, Job.fence == fence, Job.status == "running")
        .values(**(values or {"fence": fence}))  # an UPDATE that changes nothing still takes the lock
        .returning(Job)
        .execution_options(populate_existing=True)
    ).one_or_none()
    if job is None:
        raise LeaseLost(job_id)
    return job


def _known(job: Job, rows_read: bool) -> Mapping[str, int] | None:
    """What attempts before executed, where this one read no row and none of them left it open; else None."""
    return None if rows_read or job.interrupted else (job.progress or {}).get("executed", {})


def _take_back(
    session: Session, job: Job, settings: Settings, actor: str, code: str, *, rows_read: bool = True
) -> bool:
    if job.cancel_requested:
        settlement.settle(session, job, "cancelled", executed=_known(job, rows_read), actor=actor)
    elif job.attempts >= settings.max_attempts:
        error = failure(code)
        settlement.settle(session, job, "failed", executed=_known(job, rows_read), actor=actor, error=error)
    else:
        _release(session, job, interrupted=rows_read)
        return True
    return False


def _release(session: Session, job: Job, *, interrupted: bool) -> None:
    current = session.scalars(select(now())).one()
    job.status = "queued"
    job.worker = None
    job.lease_expires_at = None
    known = dict(job.progress or {})
    allowed = known.pop("allowed", 0)
    if interrupted:
        known["crashed_at"] = max(known.get("step", 0), known.get("crashed_at", 0), allowed)
        job.interrupted = True  # and stays so until a checkpoint at or beyond that step is committed
    if job.progress is not None or interrupted:
        job.progress = known
    job.hinted_at = None
    session.flush()
    events.record(
        session,
        project_id=job.project_id,
        job_id=job.id,
        code="job_requeued",
        message="The worker stopped; the job waits for another one.",
        level="warn" if interrupted else "info",
        data={"queued_for": round(current - (job.queued_at or current))},
    )


def _note_progress(session: Session, job: Job, progress: Mapping[str, Any]) -> None:
    current = session.scalars(select(now())).one()
    known = job.progress or {}
    first = known if known.get("fence") == job.fence else {"first_step": progress["step"], "first_at": current}
    job.progress = {
        "step": progress["step"],
        "num_steps": progress["num_steps"],
        "phase": progress["phase"],
        # What an attempt before had executed beyond its checkpoint stays known: the job may be charged by it.
        "executed": settlement.at_least(progress["executed"], known.get("executed", {})),
        "at": current,
        "fence": job.fence,
        "first_step": first["first_step"],
        "first_at": first["first_at"],
        "crashed_at": known.get("crashed_at", 0),
        "allowed": known.get("allowed", 0),
    }
    session.flush()


def _to_hint(session: Session, settings: Settings) -> Sequence[str]:
    """Queued jobs, oldest first, at which nobody was hinted lately: soon after they came, then once a minute."""
    since_hint = now() - Job.hinted_at
    waited = Job.hinted_at - Job.queued_at
    due = (Job.hinted_at.is_(None)) | (
        (since_hint > settings.sweep_seconds) & ((since_hint > waited) | (since_hint > REHINT_SECONDS))
    )
    ids = session.scalars(
        select(Job.id)
        .where(Job.status == "queued")
        .where(due)
        .order_by(Job.queued_at, Job.id)
        .limit(REHINT_JOBS)
        .with_for_update(skip_locked=True, key_share=True)
    ).all()
    if ids:
        session.execute(update(Job).where(Job.id.in_(ids)).values(hinted_at=now()))
    return ids
