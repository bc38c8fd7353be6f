"""What a worker process holds: made once at its start, handed to everything that it runs."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass, field

from app.budgets import heads
from app.db.session import Database
from app.queue import Queue
from app.secret_key import load_secret_key
from app.settings import Settings
from app.signing import ReportKeys, load_report_keys
from app.storage import open_storage
from app.storage.interface import Storage


@dataclass(frozen=True)
class Workplace:
    """name: of this worker, for operators. shutting_down: set once the process was asked to end.

    done_at: when what is not done in every sweep was done last, by the monotonic clock.
    """

    settings: Settings
    database: Database
    storage: Storage
    queue: Queue
    secret_key: bytes = field(repr=False)
    report_keys: ReportKeys
    name: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")
    shutting_down: threading.Event = field(default_factory=threading.Event)
    done_at: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, settings: Settings) -> Workplace:
        """Opens database, store and broker as the settings name them."""
        secret_key = load_secret_key(settings)
        database, storage = Database(settings.database), open_storage(settings.storage)
        heads.watch(database, storage)
        return cls(
            settings=settings,
            database=database,
            storage=storage,
            queue=Queue(settings.broker),
            secret_key=secret_key,
            report_keys=load_report_keys(settings, secret_key),
        )

    def due(self, chore: str, seconds: float) -> bool:
        """Whether the chore was not done for so long; it counts as done from here on."""
        current = time.monotonic()
        if current - self.done_at.get(chore, -seconds) < seconds:
            return False
        self.done_at[chore] = current
        return True

    def close(self) -> None:
        """Closes what was opened."""
        self.queue.close()
        self.database.dispose()
