"""What is done beside training: files are processed, and a sweep repeats every hint that may have been lost."""

from __future__ import annotations

import threading

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.budgets import heads
from app.files import service as files
from app.jobs import lifecycle, submission
from app.models import service as models
from worker.workplace import Workplace

log = structlog.get_logger(__name__)


def process_file(workplace: Workplace, file_id: str) -> None:
    """Reads and checks an upload, then plans the jobs that waited for it."""
    files.process(workplace.database, workplace.storage, workplace.settings, file_id)
    plan_waiting(workplace)


def plan_waiting(workplace: Workplace) -> None:
    """Plans jobs whose files are ready by now."""
    for job_id in submission.plan_waiting(workplace.database, workplace.settings, workplace.secret_key):
        workplace.queue.hint_job(job_id)


def sweep(workplace: Workplace) -> None:
    """Expired leases are taken back, queued jobs and unread files hinted at, waiting jobs planned, old bytes erased."""
    heads.keep_all(workplace.database)
    with workplace.database.writing() as session:
        queued = lifecycle.sweep(session, workplace.settings)
    with workplace.database.reading() as session:
        unread = files.files_to_process(session)
    for job_id in queued:
        workplace.queue.hint_job(job_id)
    for file_id in unread:
        workplace.queue.hint_file(file_id)
    plan_waiting(workplace)
    files.sweep(workplace.database, workplace.storage)
    models.sweep(workplace.database, workplace.storage)


class Sweeper:
    """Sweeps every so often in a thread of its own, until the block ends."""

    def __init__(self, workplace: Workplace) -> None:
        self._workplace = workplace
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep", daemon=True)

    def __enter__(self) -> Sweeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10.0)

    def _run(self) -> None:
        while not self._ended.wait(self._workplace.settings.sweep_seconds):
            try:
                sweep(self._workplace)
            except (SQLAlchemyError, OSError):
                log.exception("sweep_failed")  # the next one tries again
