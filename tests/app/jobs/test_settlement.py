"""The end of a job, on both databases: what it is charged, what it gives back, and that it ends once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select

from app.auth.service import Caller
from app.budgets.tables import LedgerEntry
from app.db.session import Database
from app.errors import Conflict
from app.jobs import keys, lifecycle, service
from app.jobs.tables import Job
from app.models.tables import Model
from app.privacy.dp_events import event_for, from_json
from app.settings import Settings
from tests.app.jobs.conftest import SECRET
from tests.app.jobs.test_lifecycle import (
    CHECKPOINT,
    MODEL_FIELDS,
    Look,
    Submit,
    all_steps,
    beat,
    claim,
    settled,
    sweep,
)
from tests.app.jobs.test_submission import chain_holds, codes, used

pytestmark = pytest.mark.every_database


def test_success_charges_the_plan_and_publishes_the_model(
    database: Database, submit: Submit, look: Look, budget_id: str
):
    job_id = submit(suffix="ward-7").id
    claimed = claim(database, job_id)
    steps = all_steps(claimed)
    with pytest.raises(ValueError, match="whole plan"), database.writing() as session:
        lifecycle.succeed(session, job_id, claimed.fence, {**steps, "head": steps["head"] - 1}, MODEL_FIELDS)
    assert look(job_id).status == "running"
    with database.writing() as session:
        model_id = lifecycle.succeed(session, job_id, claimed.fence, steps, MODEL_FIELDS)
    job = look(job_id)
    assert (job.status, job.fine_tuned_model, job.executed) == ("succeeded", model_id, steps)
    assert job.finished_at is not None
    assert (used(database, budget_id).charged, used(database, budget_id).reserved) == (job.charges[0]["rho"], 0.0)
    assert settled(database, job_id)
    assert chain_holds(database, budget_id)
    with database.reading() as session:
        assert session.get_one(Model, model_id).job_id == job_id
        with pytest.raises(keys.KeyUnavailable):
            lifecycle.job_key(session, job_id, SECRET)


def test_a_cancel_in_the_queue_gives_everything_back(
    database: Database, submit: Submit, caller: Caller, look: Look, budget_id: str
):
    job_id = submit().id
    with database.writing() as session:
        service.cancel(session, caller, job_id)
    assert look(job_id).status == "cancelled"
    assert used(database, budget_id).total == 0.0
    assert settled(database, job_id)
    with database.writing() as session:
        assert service.cancel(session, caller, job_id).status == "cancelled"  # twice is once
        assert lifecycle.claim(session, job_id, "worker-1", 30.0) is None
    assert codes(database, job_id).count("job_cancelled") == 1


def test_a_cancel_while_running_charges_the_executed_steps(
    database: Database, submit: Submit, caller: Caller, look: Look, budget_id: str
):
    """E: the ledger's event is that of the steps which ran, and nothing else."""
    job_id = submit().id
    claimed = claim(database, job_id)
    with database.writing() as session:
        assert service.cancel(session, caller, job_id).status == "running"
    assert beat(database, claimed, centring=1, head=40).cancel_requested
    executed = {"centring": 1, "head": 41}
    with database.writing() as session:
        lifecycle.cancel_running(session, job_id, claimed.fence, executed)
    job = look(job_id)
    assert (job.status, job.executed) == ("cancelled", executed)
    with database.reading() as session:
        entry = session.scalars(
            select(LedgerEntry).where(LedgerEntry.job_id == job_id, LedgerEntry.kind == "charged")
        ).one()
    assert from_json(entry.dp_event or {}) == event_for(claimed.plan.executed(executed))
    assert 0.0 < used(database, budget_id).charged == entry.rho < job.charges[0]["rho"]
    assert settled(database, job_id)
    assert chain_holds(database, budget_id)


def test_steps_of_a_committed_checkpoint_are_charged_whatever_the_worker_says(
    database: Database, submit: Submit, look: Look
):
    job_id = submit().id
    claimed = claim(database, job_id)
    with database.writing() as session:
        lifecycle.commit_checkpoint(session, job_id, claimed.fence, CHECKPOINT)
        lifecycle.cancel_running(session, job_id, claimed.fence, {})
    assert look(job_id).executed == CHECKPOINT["executed"]


def test_a_failure_is_charged_in_full(database: Database, submit: Submit, look: Look, budget_id: str):
    job_id = submit().id
    claimed = claim(database, job_id)
    beat(database, claimed, centring=1, head=1)
    with database.writing() as session:
        lifecycle.fail(session, job_id, claimed.fence, "out_of_memory")
    job = look(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "out_of_memory"
    assert used(database, budget_id).charged == job.charges[0]["rho"]
    assert settled(database, job_id)


def test_an_unlisted_failure_code_is_not_told(database: Database, submit: Submit, look: Look):
    job_id = submit().id
    claimed = claim(database, job_id)
    with database.writing() as session:
        lifecycle.fail(session, job_id, claimed.fence, "ValueError: patient 17 has no label")
    assert (look(job_id).error or {})["code"] == "trainer_error"


def test_a_cancel_that_a_crash_overtook_is_charged_in_full(
    database: Database, submit: Submit, settings: Settings, caller: Caller, look: Look, budget_id: str
):
    job_id = submit().id
    claimed = claim(database, job_id, lease_seconds=-1.0)
    beat(database, claimed, centring=1, head=3)
    with database.writing() as session:
        service.cancel(session, caller, job_id)
        session.get_one(Job, job_id).lease_expires_at = 0.0
    assert sweep(database, settings) == []
    job = look(job_id)
    assert (job.status, used(database, budget_id).charged) == ("cancelled", job.charges[0]["rho"])


def test_a_cancel_after_a_crash_is_charged_in_full(
    database: Database, submit: Submit, settings: Settings, caller: Caller, look: Look, budget_id: str
):
    """Back in the queue, but nobody knows which steps the lost attempt had executed."""
    job_id = submit().id
    claim(database, job_id, lease_seconds=-1.0)
    sweep(database, settings)
    with database.writing() as session:
        service.cancel(session, caller, job_id)
    assert used(database, budget_id).charged == look(job_id).charges[0]["rho"]


def crash(database: Database, job_id: str, settings: Settings) -> None:
    with database.writing() as session:
        session.get_one(Job, job_id).lease_expires_at = 0.0
    assert sweep(database, settings) == [job_id]


@pytest.mark.parametrize("between", ["nothing", "a checkpoint before", "a graceful stop", "a second crash"])
def test_a_cancel_that_follows_a_crash_and_a_claim_is_charged_in_full(
    database: Database,
    submit: Submit,
    settings: Settings,
    caller: Caller,
    look: Look,
    budget_id: str,
    between: str,
):
    """The next attempt is not yet where the lost one was: its few steps do not pay for those."""
    job_id = submit().id
    beat(database, claim(database, job_id), centring=1, head=40)
    crash(database, job_id, settings)
    claimed = claim(database, job_id)
    beat(database, claimed, centring=1, head=3)
    if between == "a checkpoint before":
        with database.writing() as session:
            lifecycle.commit_checkpoint(session, job_id, claimed.fence, CHECKPOINT)
    elif between == "a graceful stop":
        with database.writing() as session:
            lifecycle.requeue(session, job_id, claimed.fence, {"centring": 1, "head": 3})
        claimed = claim(database, job_id)
    elif between == "a second crash":
        crash(database, job_id, settings)
        claimed = claim(database, job_id)
        with database.writing() as session:
            lifecycle.commit_checkpoint(session, job_id, claimed.fence, CHECKPOINT)
    with database.writing() as session:
        service.cancel(session, caller, job_id)
    with database.writing() as session:
        lifecycle.cancel_running(session, job_id, claimed.fence, {"centring": 1, "head": 4})
    job = look(job_id)
    assert (job.status, used(database, budget_id).charged) == ("cancelled", job.charges[0]["rho"])


def test_a_checkpoint_that_reaches_the_crash_ends_its_full_charge(
    database: Database, submit: Submit, settings: Settings, caller: Caller, look: Look, budget_id: str
):
    job_id = submit().id
    beat(database, claim(database, job_id), centring=1, head=10)
    crash(database, job_id, settings)
    claimed = claim(database, job_id)
    with database.writing() as session:
        lifecycle.commit_checkpoint(session, job_id, claimed.fence, CHECKPOINT)
        lifecycle.cancel_running(session, job_id, claimed.fence, {"centring": 1, "head": 12})
    job = look(job_id)
    assert job.executed == {"centring": 1, "head": 12}
    assert 0.0 < used(database, budget_id).charged < job.charges[0]["rho"]


def test_a_worker_that_stops_gracefully_gives_its_job_back(
    database: Database, submit: Submit, caller: Caller, look: Look, budget_id: str
):
    job_id = submit().id
    claimed = claim(database, job_id)
    executed = {"centring": 1, "head": 5}
    with database.writing() as session:
        lifecycle.requeue(session, job_id, claimed.fence, executed)
    job = look(job_id)
    assert (job.status, job.attempts, job.worker, job.lease_expires_at) == ("queued", 0, None, None)
    with database.writing() as session:
        service.cancel(session, caller, job_id)
    assert look(job_id).executed == executed
    assert 0.0 < used(database, budget_id).charged < job.charges[0]["rho"]


@pytest.mark.parametrize("again", [False, True])
def test_what_an_attempt_before_had_executed_is_charged_though_no_checkpoint_has_it(
    database: Database, submit: Submit, caller: Caller, look: Look, budget_id: str, again: bool
):
    """One that had finished when its worker stopped had seen the validation rows, too; the next had not come so far."""
    job_id = submit().id
    executed = {"centring": 1, "head": 12, "evaluation": 1}
    claimed = claim(database, job_id)
    with database.writing() as session:
        lifecycle.requeue(session, job_id, claimed.fence, executed)
    claimed = claim(database, job_id)
    if again:
        with database.writing() as session:
            lifecycle.requeue(session, job_id, claimed.fence, {})
        claimed = claim(database, job_id)
    beat(database, claimed, centring=1, head=3)
    with database.writing() as session:
        service.cancel(session, caller, job_id)
    with database.writing() as session:
        lifecycle.cancel_running(session, job_id, claimed.fence, {"centring": 1, "head": 3})
    assert look(job_id).executed == executed
    assert used(database, budget_id).charged > 0.0


def test_an_ended_job_cannot_be_cancelled(database: Database, submit: Submit, caller: Caller):
    job_id = submit().id
    claimed = claim(database, job_id)
    with database.writing() as session:
        lifecycle.fail(session, job_id, claimed.fence, "trainer_error")
    with database.writing() as session, pytest.raises(Conflict) as refused:
        service.cancel(session, caller, job_id)
    assert refused.value.code == "job_ended"


def test_cancels_and_finishes_race(database: Database, submit: Submit, caller: Caller, look: Look, budget_id: str):
    """Whoever wins, the job ends once and is charged once."""
    for _ in range(4):
        job_id = submit(privacy={"target_epsilon": 0.5}).id
        start = threading.Barrier(2)

        def work(job_id: str = job_id, start: threading.Barrier = start) -> None:
            start.wait()
            with database.writing() as session:
                claimed = lifecycle.claim(session, job_id, "worker-1", 30.0)
            if claimed is not None:
                with database.writing() as session:
                    lifecycle.fail(session, job_id, claimed.fence, "trainer_error")

        def cancel(job_id: str = job_id, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                with database.writing() as session:
                    service.cancel(session, caller, job_id)
            except Conflict:
                pass

        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(work), pool.submit(cancel)]:
                future.result()
        ends = [code for code in codes(database, job_id) if code in ("job_failed", "job_cancelled")]
        assert len(ends) == 1
        assert settled(database, job_id)
    assert used(database, budget_id).reserved == 0.0
    assert chain_holds(database, budget_id)
