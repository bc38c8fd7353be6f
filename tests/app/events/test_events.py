"""A job's history: numbered in the order of commits, read page by page or live."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import anyio
import pytest
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.db.session import Database
from app.events import repository, stream
from app.events.schemas import render
from app.events.service import record
from app.events.stream import stream as open_stream
from app.events.tables import JobEvent

JOB = "ftjob-1"


@pytest.fixture
def project(database: Database) -> str:
    with database.writing() as session:
        return auth.create_project(session, "hospital").id


def _record(database: Database, project: str, code: str, job: str = JOB) -> JobEvent:
    with database.writing() as session:
        return record(session, project_id=project, job_id=job, code=code, message=f"It was {code}.", data={"step": 1})


@pytest.mark.every_database
def test_events_are_numbered_within_their_job(database: Database, project: str) -> None:
    _record(database, project, "a")
    _record(database, project, "other", job="ftjob-2")
    with database.writing() as session:  # two in one transaction
        for code in ("b", "c"):
            record(session, project_id=project, job_id=JOB, code=code, message=code)
    with database.reading() as session:
        events = repository.after(session, project, JOB, 0, 10)
        assert [(e.sequence, e.code) for e in events] == [(1, "a"), (2, "b"), (3, "c")]
        assert repository.after(session, project, JOB, 2, 10)[0].code == "c"
        assert repository.after(session, "proj-other", JOB, 0, 10) == []


@pytest.mark.every_database
def test_concurrent_writers_leave_no_gap_and_no_double(database: Database, project: str) -> None:
    errors: list[Exception] = []

    def write() -> None:
        try:
            for _ in range(5):
                _record(database, project, "x")
        except Exception as error:
            errors.append(error)

    writers = [threading.Thread(target=write) for _ in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert errors == []
    with database.reading() as session:
        assert [e.sequence for e in repository.after(session, project, JOB, 0, 100)] == list(range(1, 31))


def test_the_wire_has_whole_seconds_and_the_fixed_code(database: Database, project: str) -> None:
    wire = render(_record(database, project, "job_started")).model_dump()
    assert isinstance(wire.pop("created_at"), int)
    assert wire.pop("id").startswith("ftevent-")
    assert wire == {
        "object": "fine_tuning.job.event",
        "level": "info",
        "type": "message",
        "code": "job_started",
        "message": "It was job_started.",
        "data": {"step": 1},
    }


def _read(database: Database, project: str, until_done: Callable[[Session], bool], last: str | None = None) -> str:
    async def read() -> str:
        return b"".join([part async for part in open_stream(database, project, JOB, last, until_done)]).decode()

    return anyio.run(read)


def _codes(text: str) -> list[str]:
    data = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(line)["code"] for line in data]


@pytest.mark.every_database
def test_a_stream_tells_what_was_and_what_comes_and_ends_with_the_job(
    database: Database, project: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "POLL_SECONDS", 0.01)
    _record(database, project, "created")
    looks = 0

    def until_done(_session: Session) -> bool:
        """The job goes on between the second look and the third, and its last event is committed with its end."""
        nonlocal looks
        looks += 1
        if looks == 2:
            _record(database, project, "started")
        if looks == 4:
            _record(database, project, "succeeded")
        return looks >= 4

    text = _read(database, project, until_done)
    assert _codes(text) == ["created", "started", "succeeded"]
    assert text.startswith(": ")


def test_a_stream_resumes_after_the_last_event_seen(database: Database, project: str) -> None:
    ids = [_record(database, project, code).id for code in ("a", "b", "c")]
    foreign = _record(database, project, "foreign", job="ftjob-2").id
    assert _codes(_read(database, project, lambda _: True, last=ids[0])) == ["b", "c"]
    assert _codes(_read(database, project, lambda _: True, last=ids[2])) == []
    assert _codes(_read(database, project, lambda _: True, last=foreign)) == ["a", "b", "c"]
    assert _codes(_read(database, project, lambda _: True, last="nonsense")) == ["a", "b", "c"]


def test_a_long_history_arrives_whole(database: Database, project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_BATCH", 3)
    for number in range(7):
        _record(database, project, str(number))
    assert _codes(_read(database, project, lambda _: True)) == [str(number) for number in range(7)]


def test_silence_is_broken_by_comments(database: Database, project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(stream, "PING_SECONDS", 0.02)
    looks = iter(range(100))
    assert ": ping" in _read(database, project, lambda _: next(looks) > 5)
