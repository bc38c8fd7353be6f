"""Files that are read in the background: claims, attempts that are lost, readers that die."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.auth import service as auth
from app.auth.tables import Project
from app.db.session import Database
from app.files import processing, service
from app.files.tables import File
from app.ids import made_at, new_id
from app.settings import Settings
from tests.app.files.conftest import Upload
from tests.app.files.test_files import DATA, Process, file_of
from tests.running import until


def test_processing_again_changes_nothing(
    upload: Upload, process: Process, database: Database, app: FastAPI, settings: Settings
) -> None:
    file = upload(DATA)
    process(file["id"])
    assert service.process(database, app.state.storage, settings, file["id"]) is False
    assert service.process(database, app.state.storage, settings, "file-none") is False


class Unreachable:
    """A store that has gone away."""

    def local_path(self, key: str) -> Path | None:
        return None

    def get_file(self, key: str, path: Path) -> None:
        raise ConnectionError


def test_a_file_is_left_to_the_next_attempt_when_the_storage_fails(
    upload: Upload, process: Process, database: Database, settings: Settings
) -> None:
    file = upload(DATA)
    storage: Any = Unreachable()
    with pytest.raises(ConnectionError):
        service.process(database, storage, settings, file["id"])
    with database.reading() as session:
        assert service.files_to_process(session) == [file["id"]]
    assert process(file["id"])["status"] == "processed"
    with database.reading() as session:
        assert service.files_to_process(session) == []


def test_a_file_whose_workers_die_ends_in_error(
    upload: Upload, process: Process, client: TestClient, database: Database, settings: Settings
) -> None:
    file = upload(DATA)
    for _ in range(settings.max_attempts):
        with database.writing() as session:  # claimed, and never heard of again
            assert processing.repository.claim(session, file["id"], -1.0) is not None
    assert process(file["id"])["error"]["code"] == "processing_failed"


def test_a_claim_is_short_and_renewed_while_the_file_is_read(
    upload: Upload, database: Database, app: FastAPI, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = settings.model_copy(update={"lease_seconds": 0.5, "heartbeat_seconds": 0.05})
    file = upload(DATA)
    read = processing._read

    def slow(*arguments: Any) -> Any:
        time.sleep(1.0)  # two leases
        assert service.process(database, app.state.storage, quick, file["id"]) is False
        return read(*arguments)

    monkeypatch.setattr(processing, "_read", slow)
    assert service.process(database, app.state.storage, quick, file["id"])
    with database.reading() as session:
        row = session.get_one(File, file["id"])
        assert (row.status, row.attempts, row.claimed_until) == ("processed", 1, None)

    # A worker that was killed holds it no longer than its last lease.
    lost = upload(DATA + b"one more,row\n")
    with database.writing() as session:
        assert processing.repository.claim(session, lost["id"], 0.2) is not None
        assert processing.repository.renew(session, lost["id"], 1, 0.2, 0)
        assert not processing.repository.renew(session, lost["id"], 2, 60.0, 0)  # another attempt's
    until(lambda: service.process(database, app.state.storage, quick, lost["id"]), 5)


def test_a_worker_that_lost_its_claim_takes_nothing_from_who_has_it(
    upload: Upload, database: Database, app: FastAPI, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = upload(DATA)

    def overtaken(*_: Any) -> Any:
        with database.writing() as session:
            session.get_one(File, file["id"]).claimed_until = 0.0
        with database.writing() as session:
            assert processing.repository.claim(session, file["id"], 60.0) is not None
        raise OSError("the store is away")

    monkeypatch.setattr(processing, "_read", overtaken)
    with pytest.raises(OSError, match="away"):
        service.process(database, app.state.storage, settings, file["id"])
    with database.writing() as session:
        assert processing.repository.renew(session, file["id"], 2, 60.0, 0)


def test_an_upload_that_was_cut_off_before_its_row_is_removed(
    upload: Upload, database: Database, app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = app.state.storage
    with database.reading() as session:
        (project,) = session.scalars(select(Project.id)).all()
    kept = upload(DATA)["id"]
    orphan = new_id("file")
    assert abs(made_at(orphan) - time.time()) < 5.0
    for name in (orphan, "something-else"):
        storage.put_bytes(f"{service.prefix(project, name)}/source", b"rows")
    assert service.sweep_orphans(database, storage) == 0  # its row may still come
    later = time.time() + 2 * 86400.0
    monkeypatch.setattr(service.time, "time", lambda: later)
    assert service.sweep_orphans(database, storage) == 1
    assert not storage.exists(f"{service.prefix(project, orphan)}/source")
    assert storage.exists(f"{service.prefix(project, kept)}/source")
    assert storage.exists(f"{service.prefix(project, 'something-else')}/source")


def test_one_worker_at_a_time_processes_a_file(
    upload: Upload, database: Database, app: FastAPI, settings: Settings
) -> None:
    file = upload(DATA)
    with database.writing() as session:
        assert processing.repository.claim(session, file["id"], 60.0) is not None
    assert service.process(database, app.state.storage, settings, file["id"]) is False
    with database.reading() as session:
        assert service.files_to_process(session) == []


def test_a_reader_that_dies_or_hangs_is_an_error_of_the_file(
    upload: Upload, process: Process, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = processing.limits_for
    monkeypatch.setattr(processing, "limits_for", lambda size: type(calm(size))(2**20, 1, 30.0, 2**20))
    assert process(upload(DATA)["id"])["error"]["code"] in ("processing_failed", "limits_exceeded")
    monkeypatch.setattr(processing, "limits_for", lambda size: type(calm(size))(2**32, 60, 0.01, 2**20))
    assert process(upload(DATA)["id"])["error"]["code"] == "limits_exceeded"
    assert list((settings.data_dir / "incoming").iterdir()) == []


def test_the_reader_hears_nothing_of_the_workers_environment(
    upload: Upload, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    run = processing.subprocess.run

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return run(*args, **kwargs)

    monkeypatch.setenv("DATABASE_URL", "postgresql://secret")
    monkeypatch.setattr(processing.subprocess, "run", watched)
    assert process(upload(DATA)["id"])["status"] == "processed"
    assert set(seen["env"]) == {"PATH", "LANG", "TZ", "HOME", "PYTHONPATH", "OMP_NUM_THREADS"}


def test_a_file_deleted_while_it_is_read_leaves_no_rows(
    upload: Upload, client: TestClient, database: Database, app: FastAPI, settings: Settings
) -> None:
    file = upload(DATA)
    storage = app.state.storage

    class DeletedMeanwhile(type(storage)):  # type: ignore[misc]
        def put_file(self, *args: Any) -> None:
            client.delete(f"/v1/files/{file['id']}")
            super().put_file(*args)

    watched = DeletedMeanwhile(storage._root)
    service.process(database, watched, settings, file["id"])
    assert not any(path.is_file() for path in (settings.data_dir / "storage").rglob("*"))


@pytest.mark.every_database
def test_one_of_many_claims_wins(database: Database, api_key: str) -> None:
    with database.reading() as session:
        caller = auth.authenticate(session, api_key)
    file_id = file_of(database, caller)
    won: list[str] = []
    barrier = threading.Barrier(8)

    def claim() -> None:
        barrier.wait()
        with database.writing() as session:
            if (file := processing.repository.claim(session, file_id, 60.0)) is not None:
                won.append(file.id)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [file_id]
