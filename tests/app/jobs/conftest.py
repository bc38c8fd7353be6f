"""Files as processing leaves them, and jobs made the way the API makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from app.auth.service import Caller
from app.auth.service import authenticate as authenticate
from app.budgets import service as budgets
from app.db.session import Database
from app.files.tables import File
from app.ids import new_id
from app.jobs import submission
from app.jobs.schemas import CreateJob
from app.jobs.tables import Job
from app.queue import Queue
from app.settings import Settings

SECRET = bytes(range(32))
MODEL = "all-MiniLM-L6-v2"


@pytest.fixture
def caller(database: Database, api_key: str) -> Caller:
    """The admin of the default project."""
    with database.reading() as session:
        return authenticate(session, api_key)


@pytest.fixture
def budget_id(database: Database, caller: Caller) -> str:
    """The default project's own budget: ε = 10 at δ = 1e-6."""
    with database.reading() as session:
        return budgets.default_for(session, caller.project_id).id


@pytest.fixture
def make_file(database: Database, caller: Caller) -> Callable[..., str]:
    """A file's id: `make_file(public=True)`, `make_file(status="uploaded")`. Two thousand rows of text and label."""

    def make(**changes: Any) -> str:
        file_id = new_id("file")
        with database.writing() as session:
            project_id = changes.pop("project_id", caller.project_id)
            public = changes.get("public", False)
            budget_id = None if public else budgets.default_for(session, project_id).id
            fields: dict[str, Any] = {
                "id": file_id,
                "project_id": project_id,
                "budget_id": budget_id,
                "filename": "rows.csv",
                "bytes": 1,
                "sha256": "a" * 64,
                "purpose": "fine-tune",
                "status": "processed",
                "public": public,
                "format": "csv",
                "num_rows": 2000,
                "rows_digest": file_id.ljust(64, "0"),
                "columns": [
                    {"name": "text", "type": "text", "distinct": 1990, "classes": None, "nulls": None},
                    {"name": "label", "type": "text", "distinct": 2, "classes": ["neg", "pos"], "nulls": None},
                ],
                "source_key": "source",
                "rows_key": "rows",
                "attempts": 1,
                "created_at": 0.0,
            }
            session.add(File(**{**fields, **changes}))
        return file_id

    return make


@pytest.fixture
def queue() -> Queue:
    """A producer whose broker is away: every hint is lost, and no job minds."""
    return Queue("redis+socket:///nonexistent/valkey.sock")


@pytest.fixture
def submit(
    database: Database, settings: Settings, caller: Caller, queue: Queue, make_file: Callable[..., str]
) -> Callable[..., Job]:
    """`submit(training_file=…, privacy={…})`; without a file, one is made."""

    def make(idempotency_key: str | None = None, **body: Any) -> Job:
        body = {"model": MODEL, **body}
        body["training_file"] = body.get("training_file") or make_file()
        request = CreateJob.model_validate(body)
        return submission.submit(database, settings, SECRET, queue, caller, request, idempotency_key)

    return make


@pytest.fixture
def look(database: Database) -> Callable[[str], Job]:
    """A job as it stands in the database now."""

    def read(job_id: str) -> Job:
        with database.reading() as session:
            return session.get_one(Job, job_id)

    return read
