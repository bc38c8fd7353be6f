"""A job in a worker's hands, on both databases: claims, fences, leases."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select

from app.auth.service import Caller
from app.budgets.tables import LedgerEntry, Reservation
from app.db.session import Database
from app.events.tables import JobEvent
from app.files.tables import FileUse
from app.jobs import lifecycle, service
from app.jobs.lifecycle import Claimed, LeaseLost
from app.jobs.tables import Job, JobKey
from app.models.tables import Model
from app.privacy.plan import PrivacyPlan
from app.settings import Settings
from tests.app.jobs.test_submission import chain_holds, codes, used

Submit = Callable[..., Job]
Look = Callable[[str], Job]

pytestmark = pytest.mark.every_database

MODEL_FIELDS: dict[str, Any] = {
    "storage_prefix": "projects/p/models/j/1",
    "files": [{"path": "config.json", "bytes": 2, "sha256": "c" * 64, "crc32": 0}],
    "archives": {"tar": {"bytes": 10, "sha256": "d" * 64}, "zip": {"bytes": 10, "sha256": "e" * 64}},
    "metrics": {},
    "privacy_report": {},
}


def claim(database: Database, job_id: str, lease_seconds: float = 30.0, *, rows_given: bool = True) -> Claimed:
    """By a worker whose trainer is ready at once."""
    with database.writing() as session:
        claimed = lifecycle.claim(session, job_id, "worker-1", lease_seconds)
    assert claimed is not None
    if rows_given:
        with database.writing() as session:
            lifecycle.give_rows(session, job_id, claimed.fence, lease_seconds)
    return claimed


def sweep(database: Database, settings: Settings) -> list[str]:
    with database.writing() as session:
        return lifecycle.sweep(session, settings)


def all_steps(job: Job | Claimed) -> dict[str, int]:
    plan = job.plan if isinstance(job, Claimed) else PrivacyPlan.from_dict(job.plan or {})
    return {part.name: part.num_steps for part in plan.parts}


def progress(claimed: Claimed, **executed: int) -> dict[str, Any]:
    return {
        "step": sum(executed.values()),
        "num_steps": sum(all_steps(claimed).values()),
        "phase": "head",
        "executed": executed,
    }


def beat(database: Database, claimed: Claimed, **executed: int) -> lifecycle.Beat:
    with database.writing() as session:
        return lifecycle.heartbeat(
            session, claimed.job_id, claimed.fence, 30.0, progress(claimed, **executed) if executed else None
        )


def settled(database: Database, job_id: str) -> bool:
    """Nothing of the job is left that only a living one needs."""
    with database.reading() as session:
        reservations = session.scalars(select(Reservation).where(Reservation.job_id == job_id)).all()
        return (
            all(row.state == "settled" for row in reservations)
            and session.get(JobKey, job_id) is None
            and not session.scalars(select(FileUse).where(FileUse.job_id == job_id)).all()
        )


# --- claims ----------------------------------------------------------------------------------------------------------


def test_a_claim_is_a_lease_with_a_fence(database: Database, submit: Submit, look: Look):
    job_id = submit().id
    claimed = claim(database, job_id)
    job = look(job_id)
    assert (job.status, job.fence, job.attempts, job.worker) == ("running", 1, 1, "worker-1")
    assert job.started_at is not None
    assert job.lease_expires_at is not None
    assert job.lease_expires_at == pytest.approx(job.started_at + 30.0, abs=1.0)
    assert (claimed.fence, claimed.attempt, claimed.checkpoint, claimed.runtime) == (1, 1, None, None)
    assert claimed.plan.digest() == job.plan_digest
    with database.writing() as session:
        assert lifecycle.claim(session, job_id, "worker-2", 30.0) is None
        assert lifecycle.claim(session, "ftjob-none", "worker-2", 30.0) is None


def test_of_many_claims_one_wins(database: Database, submit: Submit):
    for _ in range(4):
        job_id = submit(privacy={"target_epsilon": 0.5}).id
        start = threading.Barrier(8)

        def race(me: int, job_id: str = job_id, start: threading.Barrier = start) -> Claimed | None:
            start.wait()
            with database.writing() as session:
                return lifecycle.claim(session, job_id, f"worker-{me}", 30.0)

        with ThreadPoolExecutor(8) as pool:
            won = [claimed for claimed in pool.map(race, range(8)) if claimed is not None]
        assert [claimed.fence for claimed in won] == [1]


def test_a_heartbeat_renews_the_lease_and_stores_progress(database: Database, submit: Submit, look: Look):
    job_id = submit().id
    claimed = claim(database, job_id, lease_seconds=1.0)
    before = look(job_id).lease_expires_at
    assert beat(database, claimed, centring=1, head=10) == lifecycle.Beat(cancel_requested=False)
    job = look(job_id)
    assert job.lease_expires_at is not None
    assert before is not None
    assert job.lease_expires_at > before + 20.0
    assert job.progress is not None
    assert job.progress["executed"] == {"centring": 1, "head": 10}
    beat(database, claimed, centring=1, head=20)
    after = look(job_id).progress
    assert after is not None
    assert (after["step"], after["first_step"], after["first_at"]) == (21, 11, job.progress["first_at"])


# --- fences ----------------------------------------------------------------------------------------------------------

CHECKPOINT = {"key": "jobs/checkpoint", "step": 11, "executed": {"centring": 1, "head": 10}}

#: Everything that a worker may write, under the fence that it was given.
WRITES: dict[str, Callable[[Any, Claimed, Settings], object]] = {
    "heartbeat": lambda session, c, _: lifecycle.heartbeat(session, c.job_id, c.fence, 30.0, progress(c, head=1)),
    "give_rows": lambda session, c, _: lifecycle.give_rows(session, c.job_id, c.fence, 30.0),
    "allow": lambda session, c, _: lifecycle.allow(session, c.job_id, c.fence, 30.0, 5),
    "freeze_runtime": lambda session, c, _: lifecycle.freeze_runtime(session, c.job_id, c.fence, {"device": "cpu"}),
    "checkpoint": lambda session, c, _: lifecycle.commit_checkpoint(session, c.job_id, c.fence, CHECKPOINT),
    "succeed": lambda session, c, _: lifecycle.succeed(session, c.job_id, c.fence, all_steps(c), MODEL_FIELDS),
    "cancel": lambda session, c, _: lifecycle.cancel_running(session, c.job_id, c.fence, {"head": 1}),
    "fail": lambda session, c, _: lifecycle.fail(session, c.job_id, c.fence, "trainer_error"),
    "requeue": lambda session, c, _: lifecycle.requeue(session, c.job_id, c.fence),
    "abandon": lambda session, c, s: lifecycle.abandon(session, c.job_id, c.fence, s, "trainer_error"),
}


def everything(database: Database, job_id: str) -> list[Any]:
    """All that a worker's write could change."""
    with database.reading() as session:
        job = session.get_one(Job, job_id)
        row = {column.key: getattr(job, column.key) for column in Job.__mapper__.column_attrs}
        ledger = session.scalars(select(LedgerEntry.hash).order_by(LedgerEntry.id)).all()
        events = session.scalars(select(JobEvent.id).order_by(JobEvent.id)).all()
        return [row, ledger, events, session.scalars(select(Model.id)).all(), session.get(JobKey, job_id) is None]


@pytest.mark.parametrize("write", WRITES)
def test_a_stale_fence_writes_nothing(database: Database, submit: Submit, settings: Settings, look: Look, write: str):
    """A zombie wakes after another worker took the job over, at each of its writes."""
    job_id = submit().id
    zombie = claim(database, job_id, lease_seconds=-1.0)
    assert sweep(database, settings) == [job_id]
    for taken_over in (False, True):  # back in the queue, then another's
        if taken_over:
            assert claim(database, job_id).fence == zombie.fence + 1
        before = everything(database, job_id)
        with pytest.raises(LeaseLost), database.writing() as session:
            WRITES[write](session, zombie, settings)
        assert everything(database, job_id) == before
    with database.writing() as session:
        lifecycle.fail(session, job_id, zombie.fence + 1, "trainer_error")
    before = everything(database, job_id)
    for fence in (zombie.fence, zombie.fence + 1):  # nor does anybody after the end
        with pytest.raises(LeaseLost), database.writing() as session:
            WRITES[write](
                session, Claimed(**{**{n: getattr(zombie, n) for n in zombie.__slots__}, "fence": fence}), settings
            )
    assert everything(database, job_id) == before


def test_an_expired_lease_that_nobody_took_can_be_renewed(database: Database, submit: Submit):
    claimed = claim(database, submit().id, lease_seconds=-1.0)
    assert beat(database, claimed) == lifecycle.Beat(cancel_requested=False)


# --- the sweep -------------------------------------------------------------------------------------------------------


def test_a_silent_workers_job_is_taken_over_until_its_attempts_are_used_up(
    database: Database, submit: Submit, settings: Settings, look: Look, budget_id: str
):
    job_id = submit().id
    cost = look(job_id).charges[0]["rho"]
    for attempt in range(1, settings.max_attempts + 1):
        assert claim(database, job_id, lease_seconds=-1.0).attempt == attempt
        hints = sweep(database, settings)
        assert hints == ([job_id] if attempt < settings.max_attempts else [])
    job = look(job_id)
    assert (job.status, job.attempts, job.fence) == ("failed", 3, 3)
    assert job.error == {"code": "worker_lost", "message": lifecycle.failure("worker_lost")["message"], "param": None}
    assert used(database, budget_id) == type(used(database, budget_id))(charged=cost, reserved=0.0)  # in full
    assert settled(database, job_id)
    assert chain_holds(database, budget_id)
    assert codes(database, job_id)[-1] == "job_failed"


@pytest.mark.parametrize("ending", ["no attempt is left", "a cancel while it is silent", "a cancel after it"])
@pytest.mark.parametrize("given", [False, True])
def test_a_worker_that_falls_silent_before_its_trainer_had_the_rows_costs_nothing(
    database: Database,
    submit: Submit,
    settings: Settings,
    caller: Caller,
    look: Look,
    budget_id: str,
    given: bool,
    ending: str,
):
    """Nothing that a row says made it silent. Once it is written down that they may be read, anything may have."""
    impatient = settings.model_copy(update={"max_attempts": 1 if ending == "no attempt is left" else 3})
    job_id = submit().id
    claim(database, job_id, lease_seconds=-1.0, rows_given=given)
    if ending == "a cancel after it":
        assert sweep(database, impatient) == [job_id]
    if ending != "no attempt is left":
        with database.writing() as session:
            service.cancel(session, caller, job_id)
    sweep(database, impatient)
    job = look(job_id)
    assert (job.status, job.interrupted) == ("failed" if ending == "no attempt is left" else "cancelled", given)
    cost = job.charges[0]["rho"] if given else 0.0
    assert used(database, budget_id) == type(used(database, budget_id))(charged=cost, reserved=0.0)
    assert settled(database, job_id)


@pytest.mark.parametrize(
    "before", ["nothing is known", "a worker of an older version", "another attempt was given them"]
)
def test_where_nobody_noted_that_rows_were_withheld_they_may_have_been_read(
    database: Database, submit: Submit, settings: Settings, look: Look, before: str
):
    """A worker that is not upgraded yet gives its trainer the rows and notes nothing."""
    job_id = submit().id
    claim(database, job_id, lease_seconds=-1.0, rows_given=False)
    with database.writing() as session:
        job = session.get_one(Job, job_id)
        if before == "nothing is known":
            job.rows_withheld = None
        elif before == "a worker of an older version":
            job.fence += 1
    if before == "another attempt was given them":
        with database.writing() as session:
            lifecycle.give_rows(session, job_id, 1, -1.0)
    assert sweep(database, settings) == [job_id]
    assert look(job_id).interrupted
    if before == "another attempt was given them":
        claim(database, job_id, lease_seconds=-1.0, rows_given=False)
        assert sweep(database, settings) == [job_id]
        assert look(job_id).interrupted


def test_a_living_lease_is_left_alone(database: Database, submit: Submit, settings: Settings, look: Look):
    job_id = submit().id
    claim(database, job_id)
    assert sweep(database, settings) == []
    assert look(job_id).status == "running"


def test_lost_hints_are_repeated_but_not_all_the_time(
    database: Database, submit: Submit, settings: Settings, look: Look
):
    job_id = submit().id
    assert sweep(database, settings) == []  # hinted at just now

    def shift(**seconds: float) -> None:
        with database.writing() as session:
            job = session.get_one(Job, job_id)
            for name, value in seconds.items():
                setattr(job, name, getattr(job, name) - value)

    shift(queued_at=10.0, hinted_at=10.0)
    assert sweep(database, settings) == [job_id]
    assert sweep(database, settings) == []
    shift(queued_at=6.0, hinted_at=6.0)  # less than it waited for the hint before
    assert sweep(database, settings) == []
    shift(queued_at=1000.0, hinted_at=lifecycle.REHINT_SECONDS)
    assert sweep(database, settings) == [job_id]
    claim(database, job_id)
    shift(hinted_at=1000.0)
    assert sweep(database, settings) == []


def test_two_sweeps_at_once_take_a_job_back_once(database: Database, submit: Submit, settings: Settings, look: Look):
    job_ids = [submit(privacy={"target_epsilon": 0.5}).id for _ in range(4)]
    for job_id in job_ids:
        claim(database, job_id, lease_seconds=-1.0)
    start = threading.Barrier(4)

    def race(_me: int) -> list[str]:
        start.wait()
        return sweep(database, settings)

    with ThreadPoolExecutor(4) as pool:
        hints = [job_id for swept in pool.map(race, range(4)) for job_id in swept]
    assert sorted(hints) == job_ids
    for job_id in job_ids:
        assert codes(database, job_id).count("job_requeued") == 1


# --- checkpoints and runtime -----------------------------------------------------------------------------------------


def test_a_checkpoint_moves_forward_only(database: Database, submit: Submit, settings: Settings):
    job_id = submit().id
    claimed = claim(database, job_id, lease_seconds=-1.0)
    with database.writing() as session:
        assert lifecycle.commit_checkpoint(session, job_id, claimed.fence, CHECKPOINT) is None
        previous = lifecycle.commit_checkpoint(session, job_id, claimed.fence, {**CHECKPOINT, "step": 12, "key": "b"})
    assert previous is not None
    assert previous["key"] == CHECKPOINT["key"]
    for step, executed in ((12, {}), (5, {}), (13, {"head": 10_000}), (13, {"centring": 2})):
        with pytest.raises(ValueError, match=r"ahead|executed steps"), database.writing() as session:
            lifecycle.commit_checkpoint(
                session, job_id, claimed.fence, {"key": "c", "step": step, "executed": executed}
            )
    with database.writing() as session:
        session.get_one(Job, job_id).lease_expires_at = 0.0
    sweep(database, settings)
    resumed = claim(database, job_id)
    assert resumed.checkpoint is not None
    assert (resumed.checkpoint["key"], resumed.checkpoint["fence"], resumed.fence) == ("b", 1, 2)


def test_runtime_options_are_frozen_at_the_first_attempt(database: Database, submit: Submit, settings: Settings):
    job_id = submit().id
    claimed = claim(database, job_id, lease_seconds=-1.0)
    with database.writing() as session:
        first = lifecycle.freeze_runtime(session, job_id, claimed.fence, {"threads": 2})
        assert first == {"threads": 2}
    sweep(database, settings)
    second = claim(database, job_id)
    assert second.runtime == {"threads": 2}
    with database.writing() as session:
        assert lifecycle.freeze_runtime(session, job_id, second.fence, {"threads": 8}) == {"threads": 2}
        assert lifecycle.freeze_runtime(session, job_id, second.fence, {"threads": 1}, replace=True) == {"threads": 1}
