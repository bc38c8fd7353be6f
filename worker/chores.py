"""What is done beside training: files are processed, and a sweep repeats every hint that may have been lost."""

from __future__ import annotations

import os
import signal
import threading

import structlog

from app.budgets import heads
from app.exports import lifecycle as exports
from app.files import processing
from app.files import service as files
from app.jobs import lifecycle, submission
from app.models import service as models
from app.uploads import service as uploads
from worker import leftovers
from worker.workplace import Workplace

log = structlog.get_logger(__name__)

#: Seconds between two looks through the whole store.
_ORPHANS_EVERY = 3600.0


def process_file(workplace: Workplace, file_id: str) -> None:
    """Reads and checks an upload, then plans the jobs that waited for it."""
    files.process(workplace.database, workplace.storage, workplace.settings, file_id)
    plan_waiting(workplace)


def plan_waiting(workplace: Workplace) -> None:
    """Plans jobs whose files are ready by now."""
    for job_id in submission.plan_waiting(workplace.database, workplace.settings, workplace.secret_key):
        workplace.queue.hint_job(job_id)


def sweep(workplace: Workplace) -> None:
    """Expired leases are taken back, queued jobs and unread files hinted at, waiting jobs planned, old bytes erased.

    Each chore stands for itself: what one of them meets is logged, and the others are done all the same.
    """
    for chore in (
        _keep_heads,
        _hint_jobs,
        _hint_exports,
        _hint_files,
        plan_waiting,
        _clear_incoming,
        _erase_files,
        _erase_uploads,
        _erase_orphans,
        _erase_models,
        _erase_exports,
        leftovers.erase,
    ):
        try:
            chore(workplace)
        except (
            Exception
        ):  # the thread must outlive anything: without it leases never expire; the next sweep tries again
            log.exception("chore_failed", chore=chore.__name__.lstrip("_"))


def _keep_heads(workplace: Workplace) -> None:
    heads.keep_all(workplace.database)


def _hint_jobs(workplace: Workplace) -> None:
    with workplace.database.writing() as session:
        queued = lifecycle.sweep(session, workplace.settings)
    for job_id in queued:
        workplace.queue.hint_job(job_id)


def _hint_exports(workplace: Workplace) -> None:
    with workplace.database.writing() as session:
        queued = exports.sweep(session, workplace.settings)
    for export_id in queued:
        workplace.queue.hint_export(export_id)


def _hint_files(workplace: Workplace) -> None:
    with workplace.database.reading() as session:
        unread = files.files_to_process(session)
    for file_id in unread:
        workplace.queue.hint_file(file_id)


def _clear_incoming(workplace: Workplace) -> None:
    processing.remove_abandoned(workplace.settings)


def _erase_files(workplace: Workplace) -> None:
    files.sweep(workplace.database, workplace.storage)


def _erase_uploads(workplace: Workplace) -> None:
    uploads.sweep(workplace.database, workplace.storage)


def _erase_orphans(workplace: Workplace) -> None:
    if workplace.due("orphans", _ORPHANS_EVERY):
        files.sweep_orphans(workplace.database, workplace.storage)
        uploads.sweep_orphans(workplace.database, workplace.storage)


def _erase_models(workplace: Workplace) -> None:
    models.sweep(workplace.database, workplace.storage)


def _erase_exports(workplace: Workplace) -> None:
    with workplace.database.reading() as session:
        ended = exports.to_erase(session, workplace.settings)
    for _, prefix in ended:
        workplace.storage.delete_prefix(prefix)
    if ended:
        with workplace.database.writing() as session:
            exports.note_erased(session, [export_id for export_id, _ in ended])


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
        try:
            while not self._ended.wait(self._workplace.settings.sweep_seconds):
                sweep(self._workplace)
        finally:
            if not self._ended.is_set():
                # Nothing may end this thread alone: a worker without a sweep looks alive and lets leases stand for
                # ever. It ends as an operator would end it, and is started again.
                log.critical("sweep_ended")
                os.kill(os.getpid(), signal.SIGTERM)
