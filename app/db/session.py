"""Sessions: one unit of work each, committed at the edge; what must follow a commit (queue messages) waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.orm import Session

log = structlog.get_logger(__name__)

_HOOKS = "after_commit"

#: How long a writer waits for SQLite's lock.
_BUSY_SECONDS = 15


def after_commit(session: Session, action: Callable[[], object]) -> None:
    """Runs `action` once this unit of work is committed; drops it on a rollback. A failure is logged, never raised:
    what follows a commit is a hint, and a sweep repeats it."""
    session.info.setdefault(_HOOKS, []).append(action)


class Database:
    """Engine and sessions. SQLite writers begin IMMEDIATE, so that none fails in the middle for want of the lock.

    Readers may not write on either database, and read from one snapshot.
    """

    def __init__(self, url: str) -> None:
        sqlite = url.startswith("sqlite")
        self._engine = create_engine(
            url,
            pool_pre_ping=not sqlite,
            pool_size=20,
            max_overflow=20,  # together as many as there are threads that answer requests
            hide_parameters=True,  # an error's text goes to logs, a row's values do not
        )
        self._reading = self._engine
        self._turns = threading.Lock() if sqlite else None
        if sqlite:
            event.listen(self._engine, "connect", _configure_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        else:
            self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._writing = self._engine.execution_options(privtune_writing=True)
        #: What each session carries in `Session.info`: how a slice follows commits that other slices make.
        self.info: dict[str, Any] = {}

    @property
    def engine(self) -> Any:
        """SQLAlchemy's engine, for migrations and tests."""
        return self._engine

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A unit of work: committed when the block ends, rolled back when it raises."""
        with Session(self._writing, expire_on_commit=False, info=self.info) as session:
            with self._turn(), session.begin():
                session.connection()  # takes SQLite's write lock before the first read
                yield session
            for action in session.info.pop(_HOOKS, []):
                try:
                    action()
                except Exception:
                    log.warning("after_commit_failed", exc_info=True)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Writers of one process queue here for SQLite's lock: SQLite itself polls for it, and starves some of many.

        They hold no connection meanwhile. Whoever waits too long asks SQLite, which refuses in its turn.
        """
        taken = self._turns is not None and self._turns.acquire(timeout=_BUSY_SECONDS)
        try:
            yield
        finally:
            if taken and self._turns is not None:
                self._turns.release()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A consistent view that writes nothing."""
        with Session(self._reading, expire_on_commit=False, info=self.info) as session:
            yield session

    def dispose(self) -> None:
        """Closes every connection."""
        self._engine.dispose()


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we begin transactions ourselves
    for pragma in (
        "journal_mode=WAL",
        # FULL: a commit that was answered survives a power cut; a ledger may not forget what a user was told.
        "synchronous=FULL",
        f"busy_timeout={_BUSY_SECONDS * 1000}",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("privtune_writing", False)
    connection.exec_driver_sql(f"PRAGMA query_only={'OFF' if writing else 'ON'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
