"""A database restored from a backup, told from the heads that the store kept; real backups, real restores."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.budgets import heads, service
from app.budgets.repository import Usage
from app.budgets.tables import PrivacyBudget
from app.db.session import Database
from app.files.tables import File
from app.jobs import lifecycle, submission
from app.jobs.tables import Job
from app.settings import Settings
from app.storage import Storage
from tests.app.budgets.conftest import plain_charge
from tests.app.budgets.test_owner import get, kinds, refused
from tests.app.budgets.test_routes import key
from tests.app.budgets.test_service import reserve, settle, used
from tests.app.jobs.conftest import MODEL, SECRET


@pytest.fixture
def storage(app: FastAPI) -> Storage:
    opened: Storage = app.state.storage
    return opened


@pytest.fixture
def backup(settings: Settings, tmp_path: Path) -> Callable[[], Callable[[], None]]:
    """`restore = backup()` takes a backup of the SQLite database, `restore()` puts it back."""

    def take() -> Callable[[], None]:
        live, copy = settings.database.removeprefix("sqlite:///"), str(tmp_path / "backup.db")

        def transfer(source: str, target: str) -> None:
            with contextlib.closing(sqlite3.connect(source)) as one, contextlib.closing(sqlite3.connect(target)) as two:
                one.backup(two)

        transfer(live, copy)
        return lambda: transfer(copy, live)

    return take


def stored(storage: Storage, budget_id: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(b"".join(storage.stream(heads.key(budget_id))))
    return content


def as_told(client: TestClient, budget_id: str) -> dict[str, Any]:
    """The head that the store should hold, from what the budget says of itself."""
    budget = get(client, budget_id)
    return {"budget_id": budget_id, **budget["ledger_head"], "rho": budget["rho_spent"] + budget["rho_reserved"]}


@pytest.mark.every_database
def test_each_commit_leaves_its_head_in_the_store(
    client: TestClient, watched: Database, storage: Storage, budget_id: str
):
    charge = plain_charge(budget_id, 0.5)
    for act in (
        lambda: client.post(f"/v1/privacy_budgets/{budget_id}", json={"name": "patients"}),
        lambda: reserve(watched, "ftjob-1", charge),
        lambda: settle(watched, "ftjob-1", {budget_id: (charge.dp_event, 0.25)}),
        lambda: client.post(f"/v1/privacy_budgets/{budget_id}/close"),
    ):
        act()
        assert stored(storage, budget_id) == as_told(client, budget_id)
    assert stored(storage, budget_id)["sequence"] == 6
    made = client.post("/v1/privacy_budgets", json={"name": "new", "epsilon_limit": 1, "delta": 1e-6}).json()
    assert stored(storage, made["id"])["hash"] == made["ledger_head"]["hash"]


def test_a_restored_database_locks_its_budget_until_an_admin_reconciles(
    client: TestClient,
    watched: Database,
    storage: Storage,
    budget_id: str,
    make_file: Callable[..., str],
    make_key: Callable[..., str],
    backup: Callable[[], Callable[[], None]],
):
    body = {"model": MODEL, "training_file": make_file(), "privacy": {"target_epsilon": 1.0}}
    reader = key(make_key("submit"))
    waiting = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    held = get(client, budget_id)["rho_reserved"]
    restore = backup()
    # What the backup does not know: the job runs to its end, and another one with it.
    reserve(watched, "ftjob-forgotten", plain_charge(budget_id, 1.0))
    settle(watched, "ftjob-forgotten", None)
    settle(watched, waiting, None)
    known = as_told(client, budget_id)
    restore()
    assert get(client, budget_id)["rho_reserved"] == held
    assert get(client, budget_id)["rho_spent"] == 0.0

    # Neither a plan is admitted nor does a job start.
    assert not heads.may_start(watched, waiting)
    refused(client.post("/v1/fine_tuning/jobs", json=body), "budget_locked")
    estimate = client.post("/v1/fine_tuning/jobs/estimate", json=body).json()
    assert (estimate["feasible"], estimate["error"]["code"]) == (False, "budget_locked")
    locked = get(client, budget_id)
    assert (locked["status"], locked["epsilon_remaining"], locked["still_fit"]["jobs"]) == ("locked", 0.0, 0)
    assert locked["lock"]["store_head"] == {name: known[name] for name in ("sequence", "hash", "rho")}
    assert locked["lock"]["rho_missing"] == 1.0
    assert client.get("/v1/privacy_budgets").json()["data"][0]["status"] == "locked"
    with watched.writing() as session:
        assert lifecycle.claim(session, waiting, "worker", 30.0) is None
        assert session.get_one(Job, waiting).status == "queued"
    assert stored(storage, budget_id) == known  # the witness stays
    path = f"/v1/privacy_budgets/{budget_id}"
    refused(client.post(path, json={"epsilon_limit": 99}), "budget_locked")

    refused(client.post(f"{path}/reconcile", headers=reader), "insufficient_scope", 403)
    error = refused(client.post(f"{path}/reconcile", json={"rho": 0.99}), "rho_too_small")
    assert error["rho_missing"] == 1.0
    assert get(client, budget_id)["status"] == "locked"
    done = client.post(f"{path}/reconcile", json={"note": "Restored after a disk failed."}).json()
    assert (done["status"], done["lock"]) == ("open", None)
    assert (done["rho_spent"], done["rho_reserved"]) == (held + 1.0, 0.0) == (known["rho"], 0.0)
    assert done["if_fixed_in_advance"] is None  # nobody knows these events any more
    assert kinds(client, budget_id)[2:] == ["locked", "charged", "reconciled"]
    entry = get(client, budget_id, "/entries")["data"][0]
    assert (entry["rho"], entry["details"]["note"]) == (1.0, "Restored after a disk failed.")
    assert entry["actor"].startswith("key-")
    assert get(client, budget_id, "/audit")["intact"]
    assert stored(storage, budget_id) == as_told(client, budget_id)
    refused(client.post(f"{path}/reconcile"), "budget_not_locked", 409)

    # The job that may have been released already never runs again; a new one may.
    assert heads.may_start(watched, waiting)
    with watched.writing() as session:
        assert lifecycle.claim(session, waiting, "worker", 30.0) is None
    ended = client.get(f"/v1/fine_tuning/jobs/{waiting}").json()
    assert (ended["status"], ended["error"]["code"]) == ("failed", "budget_reconciled")
    assert used(watched, budget_id) == Usage(charged=known["rho"], reserved=0.0)
    assert client.post("/v1/fine_tuning/jobs", json=body).status_code == 200
    assert get(client, budget_id)["epsilon_spent_accountant"].startswith("Rényi filter")


def test_a_sweep_finds_a_restored_database_though_it_has_gone_on(
    client: TestClient, watched: Database, database: Database, budget_id: str, backup: Callable[[], Callable[[], None]]
):
    """As long a chain, or a longer one, with other entries is another chain."""
    restore = backup()
    reserve(watched, "ftjob-1", plain_charge(budget_id, 2.0))
    restore()
    for number in range(3):
        reserve(database, f"ftjob-other-{number}", plain_charge(budget_id, 0.25))  # by a writer that nobody watches
    heads.keep_all(watched)
    locked = get(client, budget_id)
    assert (locked["status"], locked["lock"]["rho_missing"]) == ("locked", 1.25)
    # All that either history holds is covered: 2.0 of the store's, of which 0.75 is held already.
    done = client.post(f"/v1/privacy_budgets/{budget_id}/reconcile", json={"rho": 2.0}).json()
    assert (done["rho_spent"], done["rho_reserved"]) == (2.75, 0.0)


def test_a_commit_whose_head_was_never_written_locks_nothing(
    client: TestClient, watched: Database, database: Database, storage: Storage, budget_id: str
):
    """A crash between the commit and the store: the store is behind, its head is in the chain."""
    reserve(watched, "ftjob-1", plain_charge(budget_id, 0.5))
    before = stored(storage, budget_id)
    reserve(database, "ftjob-2", plain_charge(budget_id, 0.5))  # no head follows
    assert stored(storage, budget_id) == before
    assert heads.may_start(watched, "ftjob-2")
    assert get(client, budget_id)["status"] == "open"
    assert stored(storage, budget_id) == as_told(client, budget_id)  # counts the job before it starts


def test_an_older_head_over_a_newer_one_locks_nothing(
    client: TestClient, watched: Database, storage: Storage, budget_id: str
):
    """A slow writer's."""
    reserve(watched, "ftjob-1", plain_charge(budget_id, 0.5))
    slow = json.dumps(stored(storage, budget_id)).encode()
    reserve(watched, "ftjob-2", plain_charge(budget_id, 0.5))
    storage.put_bytes(heads.key(budget_id), slow)
    heads.keep_all(watched)
    assert get(client, budget_id)["status"] == "open"
    assert stored(storage, budget_id) == as_told(client, budget_id)


def test_a_writer_that_was_overtaken_mends_what_it_wrote(
    client: TestClient, watched: Database, storage: Storage, budget_id: str, monkeypatch: pytest.MonkeyPatch
):
    """Between its look at the ledger and its write another one commits and writes a newer head."""
    put = storage.put_bytes

    def slowly(*arguments: Any) -> None:
        monkeypatch.setattr(storage, "put_bytes", put)
        reserve(watched, "ftjob-2", plain_charge(budget_id, 0.5))
        assert stored(storage, budget_id)["sequence"] == 3
        put(*arguments)
        assert stored(storage, budget_id)["sequence"] == 2

    monkeypatch.setattr(storage, "put_bytes", slowly)
    reserve(watched, "ftjob-1", plain_charge(budget_id, 0.5))
    assert stored(storage, budget_id) == as_told(client, budget_id)


@pytest.mark.parametrize(
    "change",
    [
        {"hash": "f" * 64},
        {"sequence": 99},
        {"sequence": "3"},
        {"sequence": 10**30},
        {"sequence": 2},
        {"rho": -1.0},
        {"rho": "much"},
        {"budget_id": "pb-other"},
        None,
    ],
)
def test_a_head_that_the_chain_does_not_hold_locks(
    client: TestClient, watched: Database, storage: Storage, budget_id: str, change: dict | None
):
    reserve(watched, "ftjob-1", plain_charge(budget_id, 0.5))
    reserve(watched, "ftjob-2", plain_charge(budget_id, 0.5))
    head = json.dumps(stored(storage, budget_id) | change).encode() if change is not None else b"no head"
    storage.put_bytes(heads.key(budget_id), head)
    heads.keep_all(watched)
    heads.keep_all(watched)
    assert get(client, budget_id)["status"] == "locked"
    assert kinds(client, budget_id)[3:] == ["locked"]  # once
    path = f"/v1/privacy_budgets/{budget_id}/reconcile"
    if get(client, budget_id)["lock"]["rho_missing"] is None:
        refused(client.post(path), "rho_required")
    done = client.post(path, json={"rho": 0.25}).json()
    assert (done["status"], done["rho_spent"]) == ("open", 1.25)
    assert stored(storage, budget_id) == as_told(client, budget_id)
    heads.keep_all(watched)
    assert get(client, budget_id)["status"] == "open"


def test_a_reconciliation_whose_head_was_never_written_stands(
    client: TestClient, watched: Database, database: Database, storage: Storage, budget_id: str
):
    """A crash right after it: what the store still holds is known by now."""
    reserve(watched, "ftjob-1", plain_charge(budget_id, 0.5))
    storage.put_bytes(heads.key(budget_id), json.dumps(stored(storage, budget_id) | {"sequence": 99}).encode())
    heads.keep_all(watched)
    heads.reconcile(database, storage, budget_id, None, None, "admin")  # nobody watches this one
    assert stored(storage, budget_id)["sequence"] == 99
    heads.keep_all(watched)
    assert get(client, budget_id)["status"] == "open"
    assert stored(storage, budget_id) == as_told(client, budget_id)


def test_what_the_store_took_in_meanwhile_is_charged_too(
    client: TestClient, watched: Database, storage: Storage, budget_id: str
):
    reserve(watched, "ftjob-1", plain_charge(budget_id, 0.5))
    head = stored(storage, budget_id)
    for sequence, rho in ((98, 1.0), (99, 3.0)):
        storage.put_bytes(heads.key(budget_id), json.dumps(head | {"sequence": sequence, "rho": rho}).encode())
        heads.keep_all(watched)
    done = client.post(f"/v1/privacy_budgets/{budget_id}/reconcile").json()
    assert (done["status"], done["rho_spent"]) == ("open", 3.0)
    assert stored(storage, budget_id) == as_told(client, budget_id)


def test_a_job_that_waits_for_its_file_waits_for_the_reconciliation_too(
    client: TestClient,
    watched: Database,
    storage: Storage,
    settings: Settings,
    budget_id: str,
    make_file: Callable[..., str],
):
    file_id = make_file(status="uploaded")
    job_id = client.post("/v1/fine_tuning/jobs", json={"model": MODEL, "training_file": file_id}).json()["id"]
    with watched.writing() as session:
        session.get_one(File, file_id).status = "processed"
    storage.put_bytes(heads.key(budget_id), b"no head")
    for _ in range(2):  # found by the first, known to the second
        assert submission.plan_waiting(watched, settings, SECRET) == []
        assert client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["status"] == "validating_files"
    assert get(client, budget_id)["status"] == "locked"
    assert client.post(f"/v1/privacy_budgets/{budget_id}/reconcile", json={"rho": 0.0}).json()["status"] == "open"
    assert submission.plan_waiting(watched, settings, SECRET) == [job_id]


def test_a_closed_budget_is_closed_after_its_lock(
    client: TestClient, watched: Database, storage: Storage, budget_id: str
):
    client.post(f"/v1/privacy_budgets/{budget_id}/close")
    storage.put_bytes(heads.key(budget_id), json.dumps(stored(storage, budget_id) | {"hash": "0" * 64}).encode())
    heads.keep_all(watched)
    assert get(client, budget_id)["status"] == "locked"
    assert client.post(f"/v1/privacy_budgets/{budget_id}/reconcile").json()["status"] == "closed"


def test_without_the_store_nothing_is_admitted_and_nothing_breaks(
    client: TestClient,
    watched: Database,
    storage: Storage,
    budget_id: str,
    make_file: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
):
    def away(*_: Any, **__: Any) -> Any:
        raise OSError("the store does not answer")

    reserve(watched, "ftjob-1", plain_charge(budget_id, 0.5))
    monkeypatch.setattr(storage, "get_range", away)
    body = {"model": MODEL, "training_file": make_file()}
    refused(client.post("/v1/fine_tuning/jobs", json=body), "storage_unavailable", 503)
    assert not heads.may_start(watched, "ftjob-1")
    assert client.post(f"/v1/privacy_budgets/{budget_id}", json={"name": "other"}).status_code == 200
    monkeypatch.undo()
    heads.keep_all(watched)
    assert stored(storage, budget_id) == as_told(client, budget_id)
    assert get(client, budget_id)["status"] == "open"


@pytest.mark.every_database
def test_many_writers_leave_the_last_head(client: TestClient, watched: Database, storage: Storage, budget_id: str):
    start = threading.Barrier(8)

    def work(me: int) -> None:
        start.wait()
        for number in range(4):
            reserve(watched, f"ftjob-{me}-{number}", plain_charge(budget_id, 0.01))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert stored(storage, budget_id) == as_told(client, budget_id)
    assert stored(storage, budget_id)["sequence"] == 33
    with watched.reading() as session:
        assert service.status_of(session.get_one(PrivacyBudget, budget_id)) == "open"
