"""Files after their upload: processing, budgets, deletion, and the openai client."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth.service import Caller
from app.budgets import service as budgets
from app.budgets.tables import LedgerEntry
from app.db.session import Database
from app.errors import Conflict, NotFound
from app.files import processing, service
from app.files.tables import File
from app.ids import new_id
from app.settings import Settings
from app.storage import Storage
from tests.app.files.conftest import Upload

DATA = b"text,label\ngood,pos\nbad,neg\n"

Process = Callable[[str], dict[str, Any]]


def code(answer: httpx.Response) -> str:
    return answer.json()["error"]["code"]


def ledger(database: Database, budget_id: str) -> list[LedgerEntry]:
    with database.reading() as session:
        entries = session.query(LedgerEntry).filter(LedgerEntry.budget_id == budget_id)
        return list(entries.order_by(LedgerEntry.sequence))


@pytest.fixture
def other_budget(database: Database, project_id: str) -> str:
    with database.writing() as session:
        return budgets.create(
            session, project_id=project_id, name="other", epsilon_limit=5.0, delta=1e-6, actor="test"
        ).id


# --- processing ----------------------------------------------------------------------------------------------------


def test_a_dataset_is_processed(upload: Upload, process: Process, database: Database, app: FastAPI) -> None:
    file = process(upload(DATA)["id"])
    assert file["status"] == "processed"
    assert file["status_details"] is None
    assert file["num_rows"] == 2
    assert file["columns"] == [{"name": "text", "type": "string"}, {"name": "label", "type": "string"}]
    with database.reading() as session:
        row = session.get_one(File, file["id"])
    assert row.columns[1]["classes"] == ["neg", "pos"]
    rows = b"".join(app.state.storage.stream(row.rows_key))
    assert rows.startswith(b"PAR1")
    assert processing.hashlib.sha256(rows).hexdigest() == row.rows_digest


def test_a_broken_dataset_says_where_and_never_what(upload: Upload, process: Process, client: TestClient) -> None:
    file = process(upload(b"text,label\nfine,pos\nMaria has diabetes\nfine,neg\n")["id"])
    assert file["status"] == "error"
    assert file["error"]["code"] == "too_few_cells"
    assert (file["error"]["line"], file["error"]["column"]) == (3, 1)
    assert file["status_details"].startswith("Line 3, column 1: ")
    assert "Maria" not in client.get("/v1/files").text


# --- budgets and declarations ---------------------------------------------------------------------------------------


def test_the_same_bytes_keep_their_budget(
    upload: Upload, client: TestClient, other_budget: str, make_key: Callable[..., str], database: Database
) -> None:
    own = upload(b"text\nelse\n")["privacy_budget"]
    first = upload(DATA, privacy_budget=other_budget)
    assert first["privacy_budget"] == other_budget
    assert [entry.kind for entry in ledger(database, other_budget)] == ["opened", "file_attached"]
    assert upload(DATA)["privacy_budget"] == other_budget
    client.delete(f"/v1/files/{first['id']}")
    assert upload(DATA)["privacy_budget"] == other_budget
    answer = client.post(
        "/v1/files", files={"file": ("a.csv", DATA)}, data={"purpose": "fine-tune", "privacy_budget": own}
    )
    assert (answer.status_code, code(answer)) == (409, "budget_mismatch")
    answer = client.post(
        "/v1/files",
        files={"file": ("a.csv", b"text\nnew\n")},
        data={"purpose": "fine-tune", "privacy_budget": other_budget},
        headers={"authorization": f"Bearer {make_key('submit')}"},
    )
    assert (answer.status_code, code(answer)) == (403, "insufficient_scope")


def test_the_same_rows_under_other_bytes_keep_their_budget(
    upload: Upload, process: Process, client: TestClient, other_budget: str, make_key: Callable[..., str]
) -> None:
    """Packed, in another format, or by somebody who may choose no budget: its owner's limit holds for the rows."""
    first = upload(DATA, privacy_budget=other_budget)
    process(first["id"])
    lines = b'{"text": "good", "label": "pos"}\n{"text": "bad", "label": "neg"}\n'
    own = upload(b"text,label\ngood,pos\nbad,pos\n")["privacy_budget"]
    assert own != other_budget
    headers = {"authorization": f"Bearer {make_key('submit')}"}
    for name, data in (("a.csv.gz", gzip.compress(DATA)), ("a.jsonl", lines)):
        again = client.post(
            "/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune"}, headers=headers
        ).json()
        assert again["privacy_budget"] == own  # what its rows are is not known yet
        assert process(again["id"])["privacy_budget"] == other_budget


def test_a_public_file_has_no_budget_and_is_audited(
    upload: Upload, database: Database, project_id: str, client: TestClient
) -> None:
    file = upload(DATA, public="true")
    assert (file["public"], file["privacy_budget"], file["privacy_unit"]) == (True, None, None)
    with database.reading() as session:
        own = budgets.default_for(session, project_id).id
    entry = ledger(database, own)[-1]
    assert (entry.kind, entry.details) == ("public_declared", {"file_id": file["id"]})


def test_what_was_private_cannot_become_public(upload: Upload, process: Process, client: TestClient) -> None:
    private = upload(DATA)
    process(private["id"])

    def declare(data: bytes, name: str) -> httpx.Response:
        return client.post("/v1/files", files={"file": (name, data)}, data={"purpose": "fine-tune", "public": "true"})

    assert code(declare(DATA, "a.csv")) == "was_private"
    client.delete(f"/v1/files/{private['id']}")
    assert code(declare(DATA, "a.csv")) == "was_private"
    # The same rows under other bytes are found once they are read.
    lines = b'{"text": "good", "label": "pos"}\n{"text": "bad", "label": "neg"}\n'
    file = process(declare(lines, "a.jsonl").json()["id"])
    assert file["error"]["code"] == "was_private"


# --- reading, listing, deleting --------------------------------------------------------------------------------------


def test_another_project_sees_nothing(upload: Upload, client: TestClient, make_key: Callable[..., str]) -> None:
    file = upload(DATA)
    headers = {"authorization": f"Bearer {make_key('admin', project='other')}"}
    missing = client.get("/v1/files/file-none", headers=headers).json()["error"]
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content")):
        answer = client.request(method, f"/v1/files/{file['id']}{path}", headers=headers)
        assert answer.status_code == 404
        assert answer.json()["error"] == missing
    assert client.get("/v1/files", headers=headers).json()["data"] == []


def test_raw_rows_need_an_admin_key(upload: Upload, client: TestClient, make_key: Callable[..., str]) -> None:
    file = upload(DATA)
    for scope in ("read", "submit"):
        headers = {"authorization": f"Bearer {make_key(scope)}"}
        assert code(client.get(f"/v1/files/{file['id']}/content", headers=headers)) == "insufficient_scope"
        assert client.get(f"/v1/files/{file['id']}", headers=headers).status_code == 200
    assert client.get(f"/v1/files/{file['id']}/content", headers={"range": "bytes=5-9"}).content == DATA[5:10]


def test_lists_are_pages(upload: Upload, client: TestClient) -> None:
    ids = [upload(b"text\n%d\n" % number)["id"] for number in range(5)]
    first = client.get("/v1/files", params={"limit": 2}).json()
    assert [file["id"] for file in first["data"]] == [ids[4], ids[3]]
    assert first["has_more"]
    rest = client.get("/v1/files", params={"after": ids[3], "purpose": "fine-tune"}).json()
    assert [file["id"] for file in rest["data"]] == [ids[2], ids[1], ids[0]]
    assert not rest["has_more"]
    assert client.get("/v1/files", params={"purpose": "batch"}).json()["data"] == []


def test_a_deleted_file_leaves_no_bytes_and_a_row(
    upload: Upload, process: Process, client: TestClient, database: Database, settings: Settings
) -> None:
    file = upload(DATA)
    process(file["id"])
    answer = client.delete(f"/v1/files/{file['id']}")
    assert answer.json() == {"id": file["id"], "object": "file", "deleted": True}
    assert client.get(f"/v1/files/{file['id']}").status_code == 404
    assert client.delete(f"/v1/files/{file['id']}").status_code == 404
    assert not any(path.is_file() for path in (settings.data_dir / "storage").rglob("*"))
    with database.reading() as session:
        row = session.get_one(File, file["id"])
    assert row.deleted_at is not None
    assert row.erased_at is not None


def test_a_file_in_use_cannot_be_deleted(upload: Upload, client: TestClient, database: Database) -> None:
    file = upload(DATA)
    with database.writing() as session:
        service.hold(session, file["id"], "ftjob-1")
        service.hold(session, file["id"], "ftjob-1")
        service.hold(session, file["id"], "ftjob-2")
    answer = client.delete(f"/v1/files/{file['id']}")
    assert (answer.status_code, code(answer)) == (409, "file_in_use")
    assert answer.headers["x-should-retry"] == "false"
    with database.writing() as session:
        service.release(session, "ftjob-1")
    assert client.delete(f"/v1/files/{file['id']}").status_code == 409
    with database.writing() as session:
        service.release(session, "ftjob-2")
    assert client.delete(f"/v1/files/{file['id']}").status_code == 200
    with database.writing() as session, pytest.raises(NotFound):
        service.hold(session, file["id"], "ftjob-3")


def test_sweeps_delete_what_expired_and_erase_what_a_crash_left(
    upload: Upload, client: TestClient, database: Database, app: FastAPI, settings: Settings
) -> None:
    expired, held, crashed = (upload(b"text\n%d\n" % number)["id"] for number in range(3))
    with database.writing() as session:
        service.hold(session, held, "ftjob-1")
        for file_id in (expired, held):
            session.get_one(File, file_id).expires_at = 1.0
        session.get_one(File, crashed).deleted_at = 1.0
    service.sweep(database, app.state.storage)
    assert client.get(f"/v1/files/{expired}").status_code == 404
    assert client.get(f"/v1/files/{held}").status_code == 200
    left = {path.parent.name for path in (settings.data_dir / "storage").rglob("*") if path.is_file()}
    assert left == {held}
    service.sweep(database, app.state.storage)


@pytest.mark.every_database
def test_a_file_that_a_job_took_after_the_sweeps_snapshot_stays(
    database: Database, api_key: str, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PostgreSQL's query says may be older than the lock it takes: the job's hold, committed between, counts."""
    with database.reading() as session:
        caller = auth.authenticate(session, api_key)
    taken, free = (file_of(database, caller, expires_after=1) for _ in range(2))
    with database.writing() as session:
        for file_id in (taken, free):
            session.get_one(File, file_id).expires_at = 1.0
        service.hold(session, taken, "ftjob-1")

    def of_an_older_snapshot(session: Session, limit: int) -> Sequence[File]:
        return session.scalars(select(File).where(File.expires_at < 2.0).with_for_update().limit(limit)).all()

    monkeypatch.setattr(service.repository, "expired", of_an_older_snapshot)
    service.sweep(database, app.state.storage)
    with database.reading() as session:
        assert session.get_one(File, taken).deleted_at is None
        assert session.get_one(File, free).deleted_at is not None


# --- races, on both databases ----------------------------------------------------------------------------------------


def file_of(database: Database, caller: Caller, **fields: Any) -> Any:
    with database.writing() as session:
        new = service.NewFile(id=new_id("file"), filename="a", bytes=1, sha256="0" * 64, purpose="fine-tune", **fields)
        return service.create(session, caller, new).id


@pytest.mark.every_database
def test_bytes_are_private_or_public_never_both(database: Database, api_key: str) -> None:
    """A private and a public upload of the same bytes at once: whoever is second is refused or joins."""
    with database.reading() as session:
        caller = auth.authenticate(session, api_key)
    outcomes: list[Any] = []
    barrier = threading.Barrier(2)

    def run(public: bool) -> None:
        barrier.wait()
        try:
            file_of(database, caller, public=public)
            outcomes.append(public)
        except Conflict as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=run, args=(public,)) for public in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes in ([False, "was_private"], [True, False], ["was_private", False])


@pytest.mark.every_database
def test_rows_that_were_protected_first_are_not_public_whichever_file_is_read_first(
    upload: Upload,
    process: Process,
    client: TestClient,
    database: Database,
    app: FastAPI,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under other bytes nobody knows before both are read: the public one has to wait, also while the other is read."""
    lines = b'{"text": "good", "label": "pos"}\n{"text": "bad", "label": "neg"}\n'
    protected, public = upload(DATA)["id"], upload(lines, "a.jsonl", public="true")["id"]
    later = upload(b"text,label\nnew,pos\nrows,neg\n")["id"]
    read = processing._read
    looked: list[Any] = []

    def slow(*arguments: Any) -> Any:
        with database.reading() as session:
            looked.extend((service.process(database, app.state.storage, settings, public), *_waiting(session)))
        return read(*arguments)

    def _waiting(session: Session) -> Sequence[str]:
        return service.files_to_process(session)

    with database.reading() as session:
        assert _waiting(session) == [protected, later]
    with monkeypatch.context() as patch:
        patch.setattr(processing, "_read", slow)
        process(protected)
    assert looked == [False, later]
    with database.reading() as session:
        assert _waiting(session) == sorted([public, later])
    assert process(public)["error"]["code"] == "was_private"
    assert process(later)["status"] == "processed"


@pytest.mark.every_database
def test_a_file_is_either_held_or_deleted(database: Database, api_key: str) -> None:
    with database.reading() as session:
        caller = auth.authenticate(session, api_key)
    for _ in range(10):
        file_id = file_of(database, caller)
        barrier = threading.Barrier(2)
        outcomes: list[str] = []

        def hold(file_id: str = file_id, barrier: threading.Barrier = barrier, out: list[str] = outcomes) -> None:
            barrier.wait()
            try:
                with database.writing() as session:
                    service.hold(session, file_id, "ftjob-1")
                out.append("held")
            except NotFound:
                pass

        def delete(file_id: str = file_id, barrier: threading.Barrier = barrier, out: list[str] = outcomes) -> None:
            barrier.wait()
            try:
                with database.writing() as session:
                    service.delete(session, caller.project_id, file_id)
                out.append("deleted")
            except Conflict:
                pass

        threads = [threading.Thread(target=target) for target in (hold, delete)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 1


# --- the unmodified client -------------------------------------------------------------------------------------------


def test_the_openai_client(
    openai_client: openai.OpenAI, database: Database, live_server: Any, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "data.csv").write_bytes(DATA)
    with (tmp_path / "data.csv").open("rb") as source:
        file = openai_client.files.create(
            file=source,
            purpose="fine-tune",
            expires_after={"anchor": "created_at", "seconds": 7200},
            extra_body={"public": True},
        )
    assert file.status == "uploaded"
    assert file.public is True  # type: ignore[attr-defined]
    assert file.expires_at == file.created_at + 7200

    storage: Storage = live_server.app.state.storage
    worker = threading.Thread(target=service.process, args=(database, storage, settings, file.id))
    worker.start()
    done = openai_client.files.wait_for_processing(file.id, poll_interval=0.05, max_wait_seconds=30)
    worker.join()
    assert done.status == "processed"
    assert openai_client.files.retrieve(file.id).filename == "data.csv"
    assert [each.id for each in openai_client.files.list(limit=1)] == [file.id]
    assert openai_client.files.content(file.id).read() == DATA
    assert openai_client.files.delete(file.id).deleted is True
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.files.retrieve(file.id)
    assert caught.value.code == "file_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        openai_client.files.create(file=b"x", purpose="batch")
    assert (wrong.value.code, wrong.value.param) == ("purpose_not_supported", "purpose")
