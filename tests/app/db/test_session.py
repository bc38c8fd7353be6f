"""Units of work: all or nothing, hints only after a commit, one writer at a time on SQLite."""

from __future__ import annotations

import threading
import time

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth.tables import Project
from app.db.base import now
from app.db.session import Database, after_commit

pytestmark = pytest.mark.every_database


def test_a_unit_of_work_is_committed_when_the_block_ends(database: Database) -> None:
    with database.writing() as session:
        auth.create_project(session, "one")
    with database.reading() as session:
        assert auth.get_project(session, "one").name == "one"


def test_an_error_rolls_back_and_drops_what_was_to_follow(database: Database) -> None:
    sent: list[str] = []

    def fail() -> None:
        with database.writing() as session:
            auth.create_project(session, "one")
            after_commit(session, lambda: sent.append("hint"))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    with database.reading() as session:
        assert not auth.is_set_up(session)
    assert sent == []


def test_what_follows_a_commit_sees_it_and_cannot_undo_it(database: Database) -> None:
    seen: list[bool] = []

    def look() -> None:
        with database.reading() as session:
            seen.append(auth.is_set_up(session))

    def fail() -> None:
        raise ConnectionError("the broker is down")

    with database.writing() as session:
        auth.create_project(session, "one")
        after_commit(session, fail)
        after_commit(session, look)
    assert seen == [True]


def test_a_reader_writes_nothing(database: Database) -> None:
    with database.reading() as session, pytest.raises(DBAPIError, match=r"read-?only"):
        auth.create_project(session, "one")
    with database.reading() as session:
        assert not auth.is_set_up(session)


def test_a_reader_has_one_view(database: Database) -> None:
    def count(session: Session) -> int:
        return session.scalar(select(func.count()).select_from(Project)) or 0

    with database.reading() as reader:
        assert count(reader) == 0
        with database.writing() as session:
            auth.create_project(session, "one")
        assert count(reader) == 0


def test_writers_wait_for_each_other(database: Database) -> None:
    """Read, then write, by eight at once: with a deferred transaction most of them fail with SQLITE_BUSY."""
    errors: list[Exception] = []

    def add(number: int) -> None:
        try:
            with database.writing() as session:
                auth.is_set_up(session)
                auth.create_project(session, f"project {number}")
        except Exception as error:
            errors.append(error)

    writers = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert errors == []


def test_the_database_clock_moves_within_a_transaction(database: Database) -> None:
    with database.writing() as session:
        first = session.scalars(select(now())).one()
        assert abs(first - time.time()) < 5
        session.execute(text("SELECT 1"))
        assert session.scalars(select(now())).one() >= first
