"""The right to work on something, renewed by a thread of its own: neither a long step nor a long upload loses it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.db.lease import LeaseLost
from app.db.session import Database
from app.settings import Settings

log = structlog.get_logger(__name__)

#: (session, progress) → whether the user cancelled: renews the lease, or raises LeaseLost.
Heartbeat = Callable[[Session, Mapping[str, Any] | None], bool]


class Lease:
    """Beats until the block ends. lost: set once the job is another's, or the database was silent for a whole lease.

    cancel_requested: set once the user's cancel was seen. progress: what was noted last.
    """

    def __init__(
        self, database: Database, heartbeat: Heartbeat, settings: Settings, *, cancel_requested: bool = False
    ) -> None:
        self.lost = threading.Event()
        self.cancel_requested = threading.Event()
        if cancel_requested:
            self.cancel_requested.set()
        self._database = database
        self._heartbeat = heartbeat
        self._settings = settings
        self.progress: Mapping[str, Any] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_ended, name="lease", daemon=True)
        self._renewed = time.monotonic()

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """No more beats, from its return on: called before the transaction that ends the job, and again is nothing."""
        self._ended.set()
        self._thread.join()

    def note(self, progress: Mapping[str, Any]) -> None:
        """Progress {step, num_steps, phase, executed}: the next beat stores it; only the latest counts."""
        self.progress = progress

    def _beat_until_ended(self) -> None:
        stored: Mapping[str, Any] | None = None
        while not self._ended.wait(self._settings.heartbeat_seconds):
            progress = self.progress
            began = time.monotonic()
            try:
                with self._database.writing() as session:
                    cancelled = self._heartbeat(session, progress if progress is not stored else None)
            except LeaseLost:
                return self._lose("taken_over")
            except SQLAlchemyError:
                log.warning("heartbeat_failed", exc_info=True)
                if time.monotonic() - self._renewed > self._settings.lease_seconds:
                    return self._lose("database_silent")
                continue
            self._renewed, stored = began, progress
            if cancelled:
                self.cancel_requested.set()

    def _lose(self, reason: str) -> None:
        if not self._ended.is_set():  # else the job ended under us, by our own hand
            log.warning("lease_lost", reason=reason)
            self.lost.set()
