"""An uploaded file becomes a dataset, or says why it is none. Runs in a worker, never in the API.

The file is read in a child process with limits (`app.files.reader`); what it cannot read, whatever the reason, ends in
status `error` with a fixed code. No file stays `uploaded`: attempts are counted at the claim.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.db.session import Database
from app.files import progress, repository
from app.files.limits import ReaderLimits, limits_for
from app.files.problems import Problem
from app.files.tables import File
from app.settings import Settings
from app.storage import Storage

log = structlog.get_logger(__name__)

#: How the kernel ends a reader that took too much.
_LIMIT_SIGNALS = (signal.SIGKILL, signal.SIGXCPU, signal.SIGXFSZ)

#: The folder that the reader writes to, and where in it it says how far it is.
_OUTPUT, _PROGRESS = "output", "progress"

#: A folder younger than this may be one that its worker is just about to lock.
_UNLOCKED_SECONDS = 60.0


def process(database: Database, storage: Storage, settings: Settings, file_id: str) -> bool:
    """Processes a waiting file; False where there is nothing to do, since it is done, deleted or another's, or has to
    wait for others.

    Raises what the storage raises; the file is then left to the next attempt.
    """
    with database.reading() as session:
        found = session.get(File, file_id)
        limits = limits_for(found.bytes if found else 0)
    with database.writing() as session:
        file = repository.claim(session, file_id, settings.lease_seconds)
    if file is None:
        return False
    try:
        if file.attempts > settings.max_attempts:  # earlier ones ended with their worker
            outcome: dict[str, Any] = {"problem": {"code": "processing_failed"}}
        else:
            with _work_folder(settings, file.id) as work, _kept_claim(database, settings, file, work):
                outcome = _read(storage, work, file, limits)
    except Exception:
        with database.writing() as session:
            repository.give_back(session, file_id, file.attempts)
        raise
    with database.writing() as session:
        done = _finish(session, file_id, outcome)
    if not done:  # deleted meanwhile: the rows that were stored since must go too
        storage.delete_prefix(_prefix(file))
    log.info("file_processed", file_id=file_id, code=outcome.get("problem", {}).get("code"))
    return True


@contextmanager
def _kept_claim(database: Database, settings: Settings, file: File, work: Path) -> Iterator[None]:
    """Renews the claim while the block runs, from a thread: of a worker that is killed it ends with its last lease.
    The same write shows how far the reader is."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(settings.heartbeat_seconds):
            try:
                with database.writing() as session:
                    read = progress.told(work / _OUTPUT / _PROGRESS)
                    if not repository.renew(session, file.id, file.attempts, settings.lease_seconds, read):
                        return  # another reads it by now; the first to finish wins
            except SQLAlchemyError:
                log.warning("claim_not_renewed", file_id=file.id, exc_info=True)

    thread = threading.Thread(target=beat, name="file-claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _read(storage: Storage, work: Path, file: File, limits: ReaderLimits) -> dict[str, Any]:
    """The reader's profile, with `rows_digest` and `rows_key` once the rows are stored, or its problem."""
    source = storage.local_path(file.source_key)
    if source is None:
        source = work / "source"
        storage.get_file(file.source_key, source)
    output = work / _OUTPUT
    output.mkdir()
    rows = output / "rows.parquet"
    profile = _run_reader(source, file.filename, file.unit_column, rows, limits)
    if "problem" in profile:
        return profile
    rows_key = f"{_prefix(file)}/rows.parquet"
    with rows.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    storage.put_file(report_key(file), rows.with_name("report.json"), "application/json")
    storage.put_file(rows_key, rows, "application/vnd.apache.parquet")
    return {**profile, "rows_digest": digest, "rows_key": rows_key}


def remove_abandoned(settings: Settings) -> int:
    """Removes the rows that killed workers left in the data folder; the number of files that they were of."""
    removed = 0
    for path in _incoming(settings).iterdir():
        try:
            if time.time() - path.stat().st_mtime < _UNLOCKED_SECONDS:
                continue
            held = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its worker was done
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(held)
        shutil.rmtree(path, ignore_errors=True)
        removed += 1
        log.warning("abandoned_rows_removed", gone=not path.exists())
    return removed


@contextmanager
def _work_folder(settings: Settings, file_id: str) -> Iterator[Path]:
    """A fresh folder for one reading, removed at its end; its lock says that the worker lives."""
    with tempfile.TemporaryDirectory(dir=_incoming(settings), prefix=f"{file_id}-") as name:
        held = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(held)


def _incoming(settings: Settings) -> Path:
    folder = settings.data_dir.resolve() / "incoming"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def report_key(file: File) -> str:
    """Where the owner's report of a processed file is; not of one that was processed before there were reports."""
    return f"{_prefix(file)}/report.json"


def _prefix(file: File) -> str:
    return file.source_key.rpartition("/")[0]


def _run_reader(
    source: Path, filename: str, unit_column: str | None, rows: Path, limits: ReaderLimits
) -> dict[str, Any]:
    profile = rows.with_name("profile.json")
    job = {
        "source": str(source),
        "filename": filename,
        "unit_column": unit_column,
        "rows": str(rows),
        "profile": str(profile),
        "report": str(rows.with_name("report.json")),
        "progress": str(rows.with_name(_PROGRESS)),
        "limits": asdict(limits),
        "parent": os.getpid(),
    }
    try:
        child = subprocess.run(  # noqa: S603 - our own module, arguments as a list
            [sys.executable, "-m", "app.files.reader", json.dumps(job)],
            env=reader_environment(rows.parent),
            cwd=rows.parent,
            stdin=subprocess.DEVNULL,
            # A parser's words may quote the file: nobody hears them.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=limits.wall_seconds,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return {"problem": {"code": "limits_exceeded"}}
    return outcome(profile, child.returncode)


def reader_environment(folder: Path) -> dict[str, str]:
    """Nothing of the worker's: no credentials, no proxies, no settings.

    One thread: NumPy and Arrow start one for every core, each of which reserves more than a hundred MiB of the address
    space that the reader is allowed. On a machine with many cores nothing could be read.
    """
    return {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "HOME": str(folder),
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "OMP_NUM_THREADS": "1",
    }


def outcome(profile: Path, returncode: int) -> dict[str, Any]:
    """What a reader that ended so has left: its profile, or its problem. returncode: negative for a signal."""
    try:
        read: dict[str, Any] = json.loads(profile.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        # Killed by a limit; or a library crashed, or Python could not even say that it is out of memory.
        return {"problem": {"code": "limits_exceeded" if -returncode in _LIMIT_SIGNALS else "processing_failed"}}
    return read


def _finish(session: Session, file_id: str, outcome: dict[str, Any]) -> bool:
    found = session.get_one(File, file_id)
    repository.lock_project(session, found.project_id)  # of two files with the same rows, one ends first
    file = repository.lock(session, found.project_id, file_id)
    if file is None:
        return False
    if file.status != "uploaded":
        return True
    file.claimed_until = None
    if "problem" not in outcome:
        code = _contradicts(session, file, outcome["rows_digest"])
        outcome = {"problem": {"code": code}} if code else outcome
    if "problem" in outcome:
        file.status = "error"
        file.error = Problem(**outcome["problem"]).to_dict()
    else:
        file.status, file.bytes_read = "processed", file.bytes
        file.format = outcome["format"]
        file.num_rows = outcome["num_rows"]
        file.num_units = outcome["num_units"]
        file.records_per_unit = outcome["records_per_unit"]
        file.columns = outcome["columns"]
        file.rows_key = outcome["rows_key"]
        if not file.public:
            known = repository.budget_of_rows(session, file.project_id, outcome["rows_digest"])
            file.budget_id = known or file.budget_id  # no job is planned on it yet
        file.rows_digest = outcome["rows_digest"]
    session.flush()
    return True


def _contradicts(session: Session, file: File, rows_digest: str) -> str | None:
    """The code of what an earlier file with the same rows, in whatever format, says otherwise."""
    if file.public:
        return "was_private" if repository.were_private(session, file.project_id, rows_digest) else None
    units = repository.units_of_rows(session, file.project_id, rows_digest)
    return "privacy_unit_mismatch" if units - {file.unit_column} else None
