"""A worker on a database that was put back to an older backup: it starts nothing that may have been released before."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.budgets.tables import Reservation
from app.jobs.tables import Job
from app.settings import Settings
from tests.worker.conftest import Scripted, submit
from tests.worker.test_supervisor import SUCCESS
from worker import chores, job_folder, supervisor
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


@pytest.mark.parametrize("tells_losses", [True, False])
def test_steps_whose_losses_were_told_before_the_restore_are_charged_and_never_run_again(
    client: TestClient, workplace: Workplace, settings: Settings, tmp_path: Path, tells_losses: bool
) -> None:
    """No ledger knows of them, but the store has their checkpoint. What told nothing runs again, as after a crash."""
    asked = {"privacy": {"target_epsilon": 1.0, "loss_curve": tells_losses}}
    job_id = submit(client, workplace, **asked)
    live, copy = settings.database.removeprefix("sqlite:///"), str(tmp_path / "backup.db")

    def deliver(script: str) -> Job:
        spares: Any = Scripted(job_folder.folders_root(workplace.settings), (script,))
        supervisor.run_job(workplace, spares, job_id)
        with workplace.database.reading() as session:
            return session.get_one(Job, job_id)

    transfer(live, copy)
    lost = deliver("started(); checkpoint({'centring': 1, 'head': whole['head'] - 1}); os.kill(os.getpid(), 9)")
    assert (lost.status, lost.checkpoint is not None) == ("queued", True)
    transfer(copy, live)
    found = deliver("started(); checkpoint({'centring': 1}); results(); finish()")
    with workplace.database.reading() as session:
        charged = session.query(Reservation).one().rho_charged
        assert charged == session.query(Reservation).one().rho
    if tells_losses:
        assert (found.status, (found.error or {})["code"]) == ("failed", "resume_mismatch")
    else:
        assert found.status == "succeeded"


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
