"""A worker on a database that was put back to an older backup: it starts nothing that may have been released before."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from app.budgets.tables import Reservation
from app.jobs.tables import Job
from app.settings import Settings
from tests.worker.test_supervisor import SUCCESS
from worker import chores
from worker.workplace import Workplace


def test_a_job_that_ran_to_its_end_before_the_restore_never_runs_again(
    client: TestClient,
    workplace: Workplace,
    settings: Settings,
    work: Callable[..., Any],
    job: Callable[[], Job],
    tmp_path: Path,
) -> None:
    live, copy = settings.database.removeprefix("sqlite:///"), str(tmp_path / "backup.db")
    transfer(live, copy)
    work(SUCCESS)
    assert job().status == "succeeded"
    transfer(copy, live)
    assert job().status == "queued"

    def budget() -> dict[str, Any]:
        (only,) = client.get("/v1/privacy_budgets").json()["data"]
        return only

    assert work(SUCCESS).taken == []  # the claim is never tried: its ledger is older than the model's
    assert (job().status, job().attempts) == ("queued", 0)
    assert budget()["status"] == "locked"
    chores.sweep(workplace)
    assert budget()["status"] == "locked"

    reserved = budget()["rho_reserved"]
    done = client.post(f"/v1/privacy_budgets/{budget()['id']}/reconcile").json()
    assert (done["status"], done["rho_spent"], done["rho_reserved"]) == ("open", reserved, 0.0)
    assert work(SUCCESS).taken == []
    assert job().status == "failed"
    assert job().error is not None
    assert job().error["code"] == "budget_reconciled"
    with workplace.database.reading() as session:
        assert session.query(Reservation).one().rho_charged == reserved


def test_no_trainer_starts_before_the_store_counts_its_reservation(
    workplace: Workplace, submitted: str, work: Callable[..., Any], job: Callable[[], Job], monkeypatch: Any
) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise OSError("the store does not answer")

    monkeypatch.setattr(workplace.storage, "get_range", away)
    chores.sweep(workplace)  # goes on without it
    assert work(SUCCESS).taken == []
    assert (job().status, job().attempts) == ("queued", 0)
    monkeypatch.undo()
    work(SUCCESS)
    assert job().status == "succeeded"


def transfer(source: str, target: str) -> None:
    with contextlib.closing(sqlite3.connect(source)) as one, contextlib.closing(sqlite3.connect(target)) as two:
        one.backup(two)
