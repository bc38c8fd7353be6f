"""From request to queue: what is stored, what is reserved, and what races leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select

from app.auth.service import Caller, authenticate
from app.budgets import ledger, repository
from app.budgets import service as budgets
from app.budgets.tables import LedgerEntry, PrivacyBudget, Reservation
from app.db.session import Database
from app.errors import ApiError, Conflict, NotFound
from app.events.tables import JobEvent
from app.files import service as files
from app.files.tables import File, FileUse
from app.jobs import keys, lifecycle, service, submission
from app.jobs.schemas import CreateJob
from app.jobs.tables import Job, JobKey
from app.privacy.plan import PrivacyPlan
from app.queue import Queue
from app.settings import Settings
from tests.app.jobs.conftest import MODEL, SECRET

Submit = Callable[..., Job]
MakeFile = Callable[..., str]
Look = Callable[[str], Job]

TABLES = (Job, JobKey, JobEvent, FileUse, Reservation, LedgerEntry)


def counts(database: Database) -> list[int]:
    with database.reading() as session:
        return [session.scalars(select(func.count()).select_from(table)).one() for table in TABLES]


def used(database: Database, budget_id: str) -> repository.Usage:
    with database.reading() as session:
        return budgets.usage(session, budget_id)


def chain_holds(database: Database, budget_id: str) -> bool:
    with database.reading() as session:
        entries = session.scalars(repository.entries(budget_id).order_by(LedgerEntry.sequence)).all()
        return ledger.first_broken(entries, session.get_one(PrivacyBudget, budget_id)) is None


def codes(database: Database, job_id: str) -> list[str]:
    with database.reading() as session:
        return list(session.scalars(select(JobEvent.code).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence)))


@pytest.mark.every_database
def test_a_job_is_stored_with_its_whole_cost(database: Database, submit: Submit, budget_id: str, look: Look):
    job = look(submit(suffix="ward-7", metadata={"team": "x"}, seed=7).id)
    assert (job.status, job.suffix, job.seed, job.job_metadata) == ("queued", "ward-7", 7, {"team": "x"})
    assert job.plan is not None
    plan = PrivacyPlan.from_dict(job.plan)
    assert plan.digest() == job.plan_digest  # JSON in the database gives the plan back to the bit
    (charge,) = job.charges
    assert charge["budget_id"] == budget_id
    assert used(database, budget_id) == repository.Usage(charged=0.0, reserved=charge["rho"])
    assert codes(database, job.id) == ["job_created", "job_queued"]
    assert chain_holds(database, budget_id)
    with database.reading() as session:
        entry = session.scalars(select(LedgerEntry).where(LedgerEntry.job_id == job.id)).one()
        assert (entry.kind, entry.dp_event, entry.rho) == ("reserved", charge["dp_event"], charge["rho"])


def test_the_key_opens_for_this_job_data_and_plan_only(database: Database, submit: Submit):
    job_id, other_id = submit().id, submit(privacy={"target_epsilon": 1.0}).id
    with database.reading() as session:
        key = lifecycle.job_key(session, job_id, SECRET)
        assert len(key) == 32
        assert key == lifecycle.job_key(session, job_id, SECRET) != lifecycle.job_key(session, other_id, SECRET)
        with pytest.raises(keys.KeyUnavailable):
            lifecycle.job_key(session, job_id, bytes(32))
    for change in ({"plan_digest": "0" * 64}, {"resolved": {"training_digest": "0" * 64}}):
        with database.reading() as session:
            job = session.get_one(Job, job_id)
            for name, value in change.items():
                setattr(job, name, value)
            with session.no_autoflush, pytest.raises(keys.KeyUnavailable):
                keys.unwrap(session, job, SECRET)
    with database.writing() as session:
        moved = session.get_one(JobKey, job_id).wrapped
        session.get_one(JobKey, other_id).wrapped = moved
    with database.reading() as session, pytest.raises(keys.KeyUnavailable):
        lifecycle.job_key(session, other_id, SECRET)


def test_the_key_is_stored_wrapped(database: Database, submit: Submit):
    job_id = submit().id
    with database.reading() as session:
        key = lifecycle.job_key(session, job_id, SECRET)
        assert key not in session.get_one(JobKey, job_id).wrapped


# --- what is refused -------------------------------------------------------------------------------------------------


def test_files_that_are_not_there(database: Database, submit: Submit, make_file: MakeFile, make_key: Any):
    make_key("submit", project="other")
    with database.reading() as session:
        stranger = session.scalars(select(PrivacyBudget.project_id).where(PrivacyBudget.name == "other")).one()
    mine = make_file()
    for name, body in (
        ("training_file", {"training_file": "file-none"}),
        ("training_file", {"training_file": make_file(project_id=stranger)}),
        ("training_file", {"training_file": make_file(deleted_at=1.0)}),
        ("validation_file", {"training_file": mine, "validation_file": "file-none"}),
    ):
        with pytest.raises(NotFound) as refused:
            submit(**body)
        assert (refused.value.code, refused.value.param) == ("file_not_found", name)


def test_a_refused_request_leaves_nothing(database: Database, submit: Submit, make_file: MakeFile):
    bad = make_file(status="error", error={"code": "broken_row", "message": "Line 3: A row cannot be read."})
    good = make_file()
    before = counts(database)
    for body, code in (
        ({"training_file": bad}, "file_failed"),
        ({"training_file": good, "model": "gpt-5"}, "model_not_found"),
        ({"training_file": good, "privacy": {"target_epsilon": 40.0}}, "budget_exceeded"),
        ({"training_file": good, "privacy": {"mechanism": "none"}}, "mechanism_not_allowed"),
    ):
        with pytest.raises(ApiError) as refused:
            submit(**body)
        assert refused.value.code == code
    assert counts(database) == before


def test_an_estimate_says_what_the_submit_certifies_and_stores_nothing(
    database: Database, settings: Settings, caller: Caller, submit: Submit, make_file: MakeFile, look: Look
):
    file_id = make_file()
    before = counts(database)
    body = CreateJob.model_validate({"model": MODEL, "training_file": file_id, "privacy": {"target_epsilon": 1.7}})
    planned = submission.estimate(database, settings, caller, body)
    assert counts(database) == before
    job = look(submit(training_file=file_id, privacy={"target_epsilon": 1.7}).id)
    assert planned.plan.to_dict() == PrivacyPlan.from_dict(job.plan or {}).to_dict()


def test_a_file_in_use_stays_until_its_job_has_ended(
    database: Database, submit: Submit, make_file: MakeFile, caller: Caller
):
    training, other = make_file(), make_file()
    job = submit(training_file=training, validation_file=other)
    for file_id in (training, other):
        with database.writing() as session, pytest.raises(Conflict) as refused:
            files.delete(session, caller.project_id, file_id)
        assert refused.value.code == "file_in_use"
    with database.writing() as session:
        service.cancel(session, caller, job.id)
    with database.writing() as session:
        files.delete(session, caller.project_id, training)


# --- files that are still being read ---------------------------------------------------------------------------------


def processed(database: Database, file_id: str, **changes: Any) -> None:
    with database.writing() as session:
        file = session.get_one(File, file_id)
        file.status = "processed"
        for name, value in changes.items():
            setattr(file, name, value)


@pytest.mark.every_database
def test_a_job_waits_for_its_file(
    database: Database, settings: Settings, submit: Submit, make_file: MakeFile, look: Look, budget_id: str
):
    file_id = make_file(status="uploaded")
    job_id = submit(training_file=file_id).id
    assert (look(job_id).status, used(database, budget_id).total) == ("validating_files", 0.0)
    assert submission.plan_waiting(database, settings, SECRET) == []
    processed(database, file_id)
    assert submission.plan_waiting(database, settings, SECRET) == [job_id]
    assert submission.plan_waiting(database, settings, SECRET) == []
    job = look(job_id)
    assert (job.status, used(database, budget_id).reserved) == ("queued", job.charges[0]["rho"])
    with database.reading() as session:
        assert len(lifecycle.job_key(session, job_id, SECRET)) == 32


@pytest.mark.parametrize(
    ("body", "changes", "code"),
    [
        ({}, {"status": "error", "error": {"code": "no_rows", "message": "The file has no rows."}}, "file_failed"),
        ({}, {"columns": [{"name": "x", "classes": None}]}, "column_not_found"),
        ({"privacy": {"target_epsilon": 50.0}}, {}, "budget_exceeded"),
    ],
)
def test_what_cannot_be_planned_then_fails_with_the_same_code(
    database: Database,
    settings: Settings,
    submit: Submit,
    make_file: MakeFile,
    look: Look,
    budget_id: str,
    body: dict,
    changes: dict,
    code: str,
):
    file_id = make_file(status="uploaded")
    job_id = submit(training_file=file_id, **body).id
    processed(database, file_id, **changes)
    assert submission.plan_waiting(database, settings, SECRET) == []
    job = look(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == code
    assert used(database, budget_id).total == 0.0
    assert codes(database, job_id)[-1] == "job_failed"
    with database.reading() as session:
        assert session.get(FileUse, (file_id, job_id)) is None


@pytest.mark.parametrize(("scope", "status"), [("submit", "failed"), ("admin", "queued")])
def test_a_waiting_job_takes_labels_from_its_file_as_far_as_its_key_reaches(
    database: Database,
    settings: Settings,
    queue: Queue,
    make_file: MakeFile,
    make_key: Callable[..., str],
    look: Look,
    scope: str,
    status: str,
):
    columns = [
        {"name": "text", "classes": None, "nulls": None},
        {"name": "email", "classes": ["a@ward.example", "b@ward.example"], "nulls": None},
    ]
    file_id = make_file(status="uploaded", columns=columns)
    token = make_key(scope)
    with database.reading() as session:
        caller = authenticate(session, token)
    body = CreateJob.model_validate({"model": MODEL, "training_file": file_id, "task": {"columns": {"label": "email"}}})
    job_id = submission.submit(database, settings, SECRET, queue, caller, body).id
    processed(database, file_id)
    submission.plan_waiting(database, settings, SECRET)
    job = look(job_id)
    assert (job.status, (job.error or {}).get("code")) == (status, None if status == "queued" else "labels_required")
    assert "ward.example" not in str(job.error)


def test_a_waiting_job_can_be_cancelled(
    database: Database, settings: Settings, submit: Submit, make_file: MakeFile, caller: Caller, look: Look
):
    file_id = make_file(status="uploaded")
    job_id = submit(training_file=file_id).id
    with database.writing() as session:
        service.cancel(session, caller, job_id)
    processed(database, file_id)
    assert submission.plan_waiting(database, settings, SECRET) == []
    assert look(job_id).status == "cancelled"


def test_a_waiting_job_that_cannot_be_read_fails_and_the_others_are_planned(
    database: Database, settings: Settings, submit: Submit, make_file: MakeFile, look: Look
):
    file_id = make_file(status="uploaded")
    broken, sound = submit(training_file=file_id).id, submit(training_file=file_id).id
    with database.writing() as session:
        session.get_one(Job, broken).request = {"model": 7}  # what no version of ours wrote
    processed(database, file_id)
    assert submission.plan_waiting(database, settings, SECRET) == [sound]
    assert (look(broken).status, look(broken).error["code"]) == ("failed", "planning_failed")
