"""Submits that meet: on one budget, one file, one Idempotency-Key."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from app.auth.service import Caller
from app.db.session import Database
from app.errors import ApiError, BudgetExceeded, Conflict, NotFound
from app.files import service as files
from app.ids import new_id
from app.jobs import planning, service
from app.jobs.tables import Job
from app.settings import Settings
from tests.app.jobs.test_submission import MakeFile, Submit, chain_holds, counts, used


@pytest.mark.every_database
def test_two_submits_race_for_the_last_of_a_budget(
    database: Database, settings: Settings, submit: Submit, make_file: MakeFile, caller: Caller, budget_id: str
):
    """Each alone fits, both do not: one is queued, the other is told the nearest plan, nothing is over-spent."""
    file_id = make_file()
    for _ in range(3):
        start = threading.Barrier(2)

        def race(_me: int, start: threading.Barrier = start) -> Job | BudgetExceeded:
            start.wait()
            try:
                return submit(training_file=file_id, privacy={"target_epsilon": 7.0})
            except BudgetExceeded as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(race, range(2)))
        (winner,) = [result for result in results if isinstance(result, Job)]
        (loser,) = [result for result in results if isinstance(result, BudgetExceeded)]
        assert loser.code == "budget_exceeded"
        assert 0.0 < loser.extra["nearest_plan"]["target_epsilon"] < 7.0
        assert used(database, budget_id).total == winner.charges[0]["rho"]
        assert chain_holds(database, budget_id)
        with database.writing() as session:
            service.cancel(session, caller, winner.id)


@pytest.mark.every_database
def test_a_submit_that_lost_its_plan_to_another_is_planned_again(
    database: Database, submit: Submit, make_file: MakeFile, budget_id: str, monkeypatch: pytest.MonkeyPatch
):
    """Between planning and the lock another job takes most of the budget: refused there, then with an offer."""
    file_id = make_file()
    real, taken = planning.plan, []

    def overtaken(*arguments: Any) -> Any:
        planned = real(*arguments)
        if not taken:
            taken.append(True)
            submit(training_file=file_id, privacy={"target_epsilon": 8.0})
        return planned

    monkeypatch.setattr(planning, "plan", overtaken)
    with pytest.raises(BudgetExceeded) as refused:
        submit(training_file=file_id, privacy={"target_epsilon": 7.0})
    assert refused.value.extra["nearest_plan"] is not None
    assert counts(database)[0] == 1


@pytest.mark.every_database
def test_a_file_deleted_between_plan_and_lock(
    database: Database, submit: Submit, make_file: MakeFile, caller: Caller, monkeypatch: pytest.MonkeyPatch
):
    file_id = make_file()
    real = planning.plan

    def overtaken(*arguments: Any) -> Any:
        with database.writing() as session:
            files.delete(session, caller.project_id, file_id)
        return real(*arguments)

    monkeypatch.setattr(planning, "plan", overtaken)
    with pytest.raises(NotFound) as refused:
        submit(training_file=file_id)
    assert refused.value.code == "file_not_found"
    assert counts(database)[0] == 0


@pytest.mark.every_database
def test_a_hundred_equal_submits_with_one_key_make_one_job(
    database: Database, submit: Submit, make_file: MakeFile, budget_id: str
):
    file_id = make_file()
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: submit(idempotency_key="once", training_file=file_id), range(100)))
    assert len({job.id for job in jobs}) == 1
    assert used(database, budget_id).reserved == jobs[0].charges[0]["rho"]
    assert counts(database)[0] == 1


@pytest.mark.parametrize("failing", ["planning", "storing"])
def test_an_equal_request_that_came_first_is_the_answer_to_one_that_fails(
    database: Database, submit: Submit, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch, failing: str
):
    """The first took the budget: the second, which had not found its key, does not fit any more."""
    file_id, body = make_file(), {"privacy": {"target_epsilon": 7.0}}
    real, first = planning.plan, []

    def overtaken(*arguments: Any) -> Any:
        planned = real(*arguments) if failing == "storing" else None
        if not first:
            first.append("")  # its own planning is not overtaken
            first[0] = submit(idempotency_key="once", training_file=file_id, **body).id
        if failing == "planning" and first[0]:
            raise BudgetExceeded("budget_exceeded", "No.")
        return planned or real(*arguments)

    monkeypatch.setattr(planning, "plan", overtaken)
    assert submit(idempotency_key="once", training_file=file_id, **body).id == first[0]
    with pytest.raises(ApiError):
        submit(idempotency_key="another", training_file=file_id, **body)
    assert counts(database)[0] == 1


def test_a_key_is_good_for_one_request(database: Database, submit: Submit, make_file: MakeFile):
    file_id = make_file()
    first = submit(idempotency_key="once", training_file=file_id)
    with pytest.raises(Conflict) as refused:
        submit(idempotency_key="once", training_file=file_id, suffix="other")
    assert refused.value.code == "idempotency_conflict"
    with database.writing() as session:  # also when the file is gone by now
        service.cancel(session, Caller(first.project_id, "key", frozenset()), first.id)
        files.delete(session, first.project_id, file_id)
    assert submit(idempotency_key="once", training_file=file_id).id == first.id


@pytest.mark.every_database
def test_many_submits_on_one_file_do_not_lock_each_other_out(
    database: Database, submit: Submit, make_file: MakeFile, budget_id: str
):
    """An insert that refers to a row locks it weakly; taken before the strong lock, two would deadlock."""
    training, validation = sorted([make_file(), make_file()])
    start = threading.Barrier(6)

    def race(me: int) -> float:
        start.wait()
        pair = (training, validation) if me % 2 else (validation, training)
        job = submit(training_file=pair[0], validation_file=pair[1], privacy={"target_epsilon": 0.5})
        return job.charges[0]["rho"]

    with ThreadPoolExecutor(6) as pool:
        costs = list(pool.map(race, range(6)))
    assert used(database, budget_id).reserved == sum(costs)
    assert chain_holds(database, budget_id)


@pytest.mark.every_database
def test_audited_uploads_and_submits_do_not_lock_each_other_out(
    database: Database, submit: Submit, make_file: MakeFile, caller: Caller, budget_id: str
):
    """Both write the project's ledger and refer to the project: one that locked the project strongly would deadlock."""
    file_id = make_file()
    start = threading.Barrier(4)

    def work(me: int) -> None:
        start.wait()
        for number in range(8):
            if me % 2:
                with database.writing() as session:
                    new = files.NewFile(
                        new_id("file"), "rows.csv", 1, f"{me}{number}".zfill(64), "fine-tune", public=True
                    )
                    files.create(session, caller, new)
            else:
                job = submit(training_file=file_id, privacy={"target_epsilon": 0.5})
                with database.writing() as session:
                    service.cancel(session, caller, job.id)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert chain_holds(database, budget_id)
