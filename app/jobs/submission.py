"""From a request to a job in the queue.

Planning computes PLDs, so it stands between two units of work: facts are read, the plan is made, and one short
transaction holds the files, inserts the job, reserves from the budgets under their locks and stores the key. What the
plan was made of is looked at again there; where it has changed, everything is done once more.
"""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any

import structlog
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from app.auth.service import Caller
from app.auth.tables import ApiKey
from app.budgets import heads
from app.budgets import service as budgets
from app.budgets.service import BudgetLocked
from app.db.base import now
from app.db.session import Database, after_commit
from app.errors import ApiError, BudgetExceeded, Conflict, InvalidRequest, ServiceUnavailable
from app.events import service as events
from app.exports import service as exports
from app.files import service as files
from app.ids import new_id
from app.jobs import inputs, keys, planning, repository, settlement
from app.jobs.facts import BudgetFacts, Defaults
from app.jobs.inputs import Inputs, Stale
from app.jobs.planning import Planned, PlannedCharge
from app.jobs.schemas import CreateJob, hyperparameters_of, parsed
from app.jobs.tables import Job
from app.models import service as models
from app.queue import Queue
from app.settings import Settings

log = structlog.get_logger(__name__)

#: How often a submit is planned again because others changed the budget or the file meanwhile.
_TRIES = 3


def submit(
    database: Database,
    settings: Settings,
    secret: bytes,
    queue: Queue,
    caller: Caller,
    body: CreateJob,
    idempotency_key: str | None = None,
) -> Job:
    """A new job, queued, or waiting for its files to be read; or the one that this key made before.

    Raises InvalidRequest, NotFound, BudgetExceeded, and Conflict where the key made another job.
    """
    parsed(body)
    known = _known(database, caller, idempotency_key)
    if known is not None:
        return _same(known, body)
    try:
        return _submit(database, settings, secret, queue, caller, body, idempotency_key)
    except ApiError:
        # An equal request may have come first, and taken what made this one fail: its job is the answer.
        known = _known(database, caller, idempotency_key)
        if known is None:
            raise
    return _same(known, body)


def _known(database: Database, caller: Caller, idempotency_key: str | None) -> Job | None:
    if idempotency_key is None:
        return None
    with database.reading() as session:
        return repository.find_by_key(session, caller.project_id, idempotency_key)


def _submit(
    database: Database,
    settings: Settings,
    secret: bytes,
    queue: Queue,
    caller: Caller,
    body: CreateJob,
    idempotency_key: str | None,
) -> Job:
    for remaining in reversed(range(_TRIES)):
        facts = inputs.read(database, settings, caller.project_id, body)
        heads.require_sound(database, facts.budgets)
        planned = _plan(database, caller.project_id, body, facts, settings, caller.may("admin"))
        try:
            with database.writing() as session:
                return _store(session, secret, queue, caller, body, facts, planned, idempotency_key)
        except (Stale, BudgetExceeded):
            if not remaining:
                raise
    raise AssertionError("unreachable")


def estimate(database: Database, settings: Settings, caller: Caller, body: CreateJob) -> Planned:
    """What a submit would plan, with no job stored. Raises what it would raise; Conflict while a file is read."""
    parsed(body)
    facts = inputs.read(database, settings, caller.project_id, body)
    planned = _plan(database, caller.project_id, body, facts, settings, caller.may("admin"))
    if planned is None:
        raise Conflict("file_not_processed", "A file is still being read; try again soon.", param="training_file")
    return planned


def plan_waiting(database: Database, settings: Settings, secret: bytes) -> list[str]:
    """Plans jobs whose files have been read meanwhile; returns the ids of those now queued, to be hinted at.

    What cannot be planned fails, with the code that its submit would have answered.
    """
    with database.reading() as session:
        waiting = repository.waiting_for_files(session)
    queued = []
    for job_id in waiting:
        try:
            if _plan_one(database, settings, secret, job_id):
                queued.append(job_id)
        except (SQLAlchemyError, OSError):
            raise  # not this job's fault: the next sweep tries again
        except Exception:  # one job that cannot be read must not keep all others waiting
            log.exception("waiting_job_not_planned", job_id=job_id)
            _fail_waiting(database, job_id, ApiError("planning_failed", "The job could not be planned."))
    return queued


def _plan_one(database: Database, settings: Settings, secret: bytes, job_id: str) -> bool:
    for remaining in reversed(range(_TRIES)):
        try:
            with database.reading() as session:
                job = session.get(Job, job_id)
                if job is None or job.status != "validating_files":
                    return False
                body = CreateJob.model_validate(job.request)
                by_admin = _is_admin(session, job.key_id)
            facts = inputs.read(database, settings, job.project_id, body)
            heads.require_sound(database, facts.budgets)
            planned = _plan(database, job.project_id, body, facts, settings, by_admin)
        except (BudgetLocked, ServiceUnavailable):
            return False  # it waits until an admin has reconciled, or the store answers again
        except ApiError as error:
            _fail_waiting(database, job_id, error)
            return False
        if planned is None:
            return False
        try:
            with database.writing() as session:
                taken = _take_waiting(session, job_id)
                if taken is None:
                    return False
                inputs.require_unchanged(session, taken.project_id, facts)
                _enqueue(session, taken, planned, secret, actor="planner")
            return True
        except ApiError as error:
            if not isinstance(error, Stale | BudgetExceeded) or not remaining:
                _fail_waiting(database, job_id, error)
                return False
    return False


def _is_admin(session: Session, key_id: str) -> bool:
    """Whether the key that submitted a waiting job reaches so far; one revoked since declares nothing public."""
    key = session.get(ApiKey, key_id)
    return key is not None and key.revoked_at is None and "admin" in key.scopes


def _fail_waiting(database: Database, job_id: str, error: ApiError) -> None:
    with database.writing() as session:
        job = _take_waiting(session, job_id)
        if job is not None:
            told = {"code": error.code, "message": error.message, "param": error.param}
            settlement.settle(session, job, "failed", executed={}, actor="planner", error=told)


def _take_waiting(session: Session, job_id: str) -> Job | None:
    """The job that waits for its files, its row locked; None once it does not any more."""
    return session.scalars(
        update(Job)
        .where(Job.id == job_id, Job.status == "validating_files")
        .values(status="validating_files")
        .returning(Job)
        .execution_options(populate_existing=True)
    ).one_or_none()


def _plan(
    database: Database, project_id: str, body: CreateJob, facts: Inputs, settings: Settings, by_admin: bool
) -> Planned | None:
    if facts.training is None:
        return None

    def compare() -> None:
        if not by_admin:
            inputs.note_labels(database, project_id, body, facts)

    defaults = Defaults(settings.default_epsilon, settings.default_delta)
    planned = planning.plan(body, facts.base, facts.training, facts.validation, defaults, by_admin, compare)
    for charge in planned.charges:
        _require_terms(planned, charge, facts.budgets[charge.charge.budget_id])
    if body.export is not None:
        exports.check_adaptation(body.export.formats, planned.resolved["phases"], "export.formats")
    return planned


def _require_terms(planned: Planned, charge: PlannedCharge, budget: BudgetFacts) -> None:
    """Raises what the owner of the budget has ruled out: another privacy unit, too large a promise for one job."""
    plan, policy = planned.plan, budget.policy or {}
    budgets.require_unit(budget.id, budget.unit_column, plan.privacy_unit.column)
    # Of a validation file under a budget of its own only the evaluation is charged there, with an ε of its own.
    epsilon = "privacy.target_epsilon" if "training" in charge.datasets else "evaluation.epsilon"
    terms = (
        ("max_target_epsilon", epsilon, charge.epsilon),
        ("max_target_delta", "privacy.target_delta", plan.target_delta),
    )
    for limit, param, promised in terms:
        most = policy.get(limit)
        if most is not None and promised is not None and promised > most:
            raise InvalidRequest(
                "budget_policy",
                f"The privacy budget's policy allows at most {most:g} in one job.",
                param=param,
                privacy_budget=budget.id,
            )


# --- storing ---------------------------------------------------------------------------------------------------------


def _store(
    session: Session,
    secret: bytes,
    queue: Queue,
    caller: Caller,
    body: CreateJob,
    facts: Inputs,
    planned: Planned | None,
    idempotency_key: str | None,
) -> Job:
    created = session.scalars(select(now())).one()
    job = Job(
        id=new_id("ftjob"),
        project_id=caller.project_id,
        key_id=caller.key_id,
        status="validating_files",
        model=facts.base.id,
        suffix=body.suffix,
        seed=body.seed if body.seed is not None else secrets.randbelow(2**31),
        job_metadata=body.metadata or {},
        training_file_id=body.training_file,
        validation_file_id=body.validation_file,
        request=body.to_dict(),
        request_digest=body.digest(),
        idempotency_key=idempotency_key,
        charges=[],
        hyperparameters=hyperparameters_of(body).model_dump(),
        fence=0,
        attempts=0,
        cancel_requested=False,
        interrupted=False,
        created_at=created,
    )
    # Files first, in the order of their ids: an insert that refers to a file takes a weaker lock on it, and two such
    # inserts would each wait for the other's hold.
    try:
        with session.begin_nested():
            public = body.export.student.training_file if body.export and body.export.student else None
            for file_id in sorted({body.training_file, body.validation_file, public} - {None}, key=str):
                files.hold(session, str(file_id), job.id)
            if facts.base.source == "fine_tuned":
                models.hold(session, facts.base.id, job.id)
            session.add(job)
            session.flush()
    except IntegrityError:
        known = repository.find_by_key(session, caller.project_id, idempotency_key) if idempotency_key else None
        if known is None:
            raise
        return _same(known, body)
    inputs.require_unchanged(session, caller.project_id, facts)
    events.record(session, project_id=job.project_id, job_id=job.id, code="job_created", message="The job was created.")
    if planned is not None:
        _enqueue(session, job, planned, secret, actor=caller.key_id)
        after_commit(session, partial(queue.hint_job, job.id))
    return job


def _enqueue(session: Session, job: Job, planned: Planned, secret: bytes, actor: str) -> None:
    """Fixes the plan, takes its cost, makes the key, and queues the job. BudgetExceeded where it does not fit."""
    job.resolved = planned.resolved
    job.plan = planned.plan.to_dict()
    job.plan_digest = planned.plan.digest()
    job.charges = [charge.to_dict() for charge in planned.charges]
    job.hyperparameters = planned.hyperparameters
    current = session.scalars(select(now())).one()
    job.status, job.queued_at, job.hinted_at = "queued", current, current
    session.flush()
    keys.create(session, job, secret)
    budgets.reserve(session, job.id, [planned_charge.charge for planned_charge in planned.charges], actor)
    events.record(
        session,
        project_id=job.project_id,
        job_id=job.id,
        code="job_queued",
        message="The files are valid, the plan fits its privacy budget; the job waits for a worker.",
        data=_promise(planned),
    )


def _promise(planned: Planned) -> dict[str, Any]:
    plan = planned.plan
    return {
        "mechanism": plan.mechanism,
        "epsilon": plan.epsilon,
        "target_delta": plan.target_delta,
        "num_steps": sum(part.num_steps for part in plan.parts),
        "labels_source": planned.resolved["task"]["labels_source"],
    }


def _same(known: Job, body: CreateJob) -> Job:
    if known.request_digest != body.digest():
        raise Conflict("idempotency_conflict", "This Idempotency-Key was used for another request.")
    return known
