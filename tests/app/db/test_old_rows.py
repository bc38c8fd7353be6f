"""A database that an older version filled is read after the upgrade, whichever revision it stood at."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import MetaData, insert, select, text
from sqlalchemy.exc import IntegrityError

from app.auth.tables import ApiKey
from app.budgets import service as budgets
from app.catalog.bases import BASES
from app.db.migrate import config, upgrade
from app.db.session import Database
from app.files import processing
from app.files.tables import File
from app.metadata import metadata
from app.models import archives
from app.models import service as models
from app.models.tables import Model, ModelUse
from app.settings import Settings

CARD = b"# A model\n"
#: Newest first, but for the head.
OLDER = [each.revision for each in ScriptDirectory.from_config(config("sqlite://")).walk_revisions()][1:]


@pytest.fixture
def paths(client: TestClient, app: FastAPI, database: Database, settings: Settings, project_id: str) -> list[str]:
    """A project in use, and where it is read: files (one failed), a job in the queue, its model, which another job
    starts from, budget and ledger."""
    rows = b"text,label\n" + b"".join(b"words,%d\n" % (number % 2) for number in range(100))
    files = []
    calm = settings.model_copy(update={"heartbeat_seconds": 600.0})  # how far the reader was is not written
    for data, public in ((rows, "false"), (b"text,label\nbroken\n", "true")):
        form = {"purpose": "fine-tune", "public": public}
        files.append(client.post("/v1/files", data=form, files={"file": ("rows.csv", data)}).json()["id"])
        assert processing.process(database, app.state.storage, calm, files[-1])
    body = {"model": "all-MiniLM-L6-v2", "training_file": files[0], "metadata": {"team": "x"}}
    job = client.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    card = {"path": "README.md", "bytes": len(CARD), "sha256": sha256(CARD).hexdigest(), "crc32": zlib.crc32(CARD)}
    with database.writing() as session:
        model = models.publish(
            session,
            project_id=project_id,
            job_id=job,
            base="all-MiniLM-L6-v2",
            suffix=None,
            storage_prefix="probe",
            files=[card],
            archives=archives.describe([card], lambda _: iter([CARD])),
            metrics={"accuracy": 0.5},
            privacy_report={"version": 1},
            base_facts=BASES["all-MiniLM-L6-v2"].to_dict(),
        )
        models.hold(session, model.id, "ftjob-later")
        budget = budgets.default_for(session, project_id)
    return [
        "/v1/files",
        *(f"/v1/files/{file}" for file in files),
        f"/v1/fine_tuning/jobs/{job}",
        f"/v1/fine_tuning/jobs/{job}/events",
        f"/v1/models/{model.id}",
        f"/v1/models/{model.id}/files",
        f"/v1/privacy_budgets/{budget.id}",
        f"/v1/privacy_budgets/{budget.id}/audit",
    ]


@pytest.mark.every_database
def test_what_an_older_version_stored_is_read(
    client: TestClient, database: Database, database_url: str, paths: list[str]
) -> None:
    before = {path: _read(client, path) for path in paths}
    with database.engine.connect() as connection:
        rows = {
            table.name: [dict(row) for row in connection.execute(select(table)).mappings()]
            for table in metadata.sorted_tables
        }
    for revision in OLDER:
        command.downgrade(config(database_url), "base")
        command.upgrade(config(database_url), revision)
        _fill(database, rows)
        upgrade(database_url)
        assert {path: _read(client, path) for path in paths} == before, revision
        _check_rows(database, revision)


def _fill(database: Database, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Of the rows what the tables of that time have room for."""
    old = MetaData()
    old.reflect(database.engine)
    with database.writing() as session:
        for table in metadata.sorted_tables:  # in the order of their references
            if table.name in old.tables and rows[table.name]:
                there = old.tables[table.name]
                kept = [{name: row[name] for name in there.columns.keys()} for row in rows[table.name]]
                session.execute(insert(there), kept)


def _read(client: TestClient, path: str) -> Any:
    answer = client.get(path)
    assert answer.status_code == 200, (path, answer.text)
    return answer.json()


def _check_rows(database: Database, revision: str) -> None:
    with database.engine.connect() as connection:
        if connection.dialect.name == "sqlite":  # a revision that makes a table anew runs without this check
            assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
    with database.reading() as session:
        read, broken = session.scalars(select(File).order_by(File.id))
        assert (read.num_units, read.bytes_read, broken.bytes_read) == (100, read.bytes, 0)
        assert read.used_at is not None
        assert session.scalars(select(ApiKey)).one().scopes == ["admin"]
        model = session.scalars(select(Model)).one()
        assert model.step_number is None
        assert len(session.scalars(select(ModelUse)).all()) == (revision >= "0005")
    fields = {column.key: getattr(model, column.key) for column in Model.__mapper__.column_attrs}
    with database.writing() as session:  # beside an old model there may be checkpoints of its job from now on
        session.add_all(Model(**{**fields, "id": f"ft-{step}", "step_number": step}) for step in (1, 2))
    for step in (None, 2):
        with pytest.raises(IntegrityError), database.writing() as session:
            session.add(Model(**{**fields, "id": "ft-again", "step_number": step}))


@pytest.mark.every_database
def test_uploads_that_ended_before_their_joins_were_kept_answer_as_they_did(
    client: TestClient, database: Database, database_url: str, paths: list[str], project_id: str
) -> None:
    """Parts had a place in the file until revision 0011; which ones were joined is known behind it."""
    file = paths[1].rpartition("/")[2]
    old = {"purpose": "fine-tune", "filename": "a.csv", "bytes": 3, "public": False, "created_at": 1.0}
    command.downgrade(config(database_url), "0010")
    tables = MetaData()
    tables.reflect(database.engine, only=["uploads", "upload_parts"])
    uploads, parts = tables.tables["uploads"], tables.tables["upload_parts"]
    with database.writing() as session:
        ended = [("done", "completed", 2.0), ("late", "completed", None)]
        for name, status, erased in (*ended, ("open", "pending", None)):
            made = {"id": f"upload-{name}", "project_id": project_id, "status": status, "expires_at": 4e9, **old}
            session.execute(
                insert(uploads).values(file_id=file if status == "completed" else None, erased_at=erased, **made)
            )
            for part_id, place in (("b", 0), ("a", 1), ("never", None)):
                at = place if status == "completed" else None
                part = {"id": f"part-{name}-{part_id}", "upload_id": f"upload-{name}", "bytes": 1, "position": at}
                session.execute(insert(parts).values(created_at=1.0, **part))
    upgrade(database_url)
    for name in ("done", "late"):
        asked = [f"part-{name}-b", f"part-{name}-a"]
        answer = client.post(f"/v1/uploads/upload-{name}/complete", json={"part_ids": asked})
        assert (answer.status_code, answer.json()["file"]["id"]) == (200, file)
        turned = client.post(f"/v1/uploads/upload-{name}/complete", json={"part_ids": asked[::-1]})
        assert turned.json()["error"]["code"] == "upload_completed"
    assert client.get("/v1/uploads/upload-done/parts").json()["data"] == []
    assert len(client.get("/v1/uploads/upload-open/parts").json()["data"]) == 3
    assert client.post("/v1/uploads/upload-open/cancel").json()["status"] == "cancelled"
