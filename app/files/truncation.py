"""What jobs cut of a file's rows, for the owner's report: exact figures, which the database never holds.

An attempt at a job stores its figures under its own fence and commits that, as it does a checkpoint: only committed
figures are told, and no attempt writes over another's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy.orm import Session

from app.files import repository
from app.files.service import prefix
from app.files.tables import File, FileTruncation
from app.storage import Storage

#: The latest jobs on a file that are told.
MOST_JOBS = 50


def store(storage: Storage, project_id: str, file_id: str, job_id: str, fence: int, figures: Mapping[str, Any]) -> None:
    """Before `commit`, outside of any unit of work. figures: `schemas.FileTruncation`, but for the job."""
    content = json.dumps({"job_id": job_id, **figures}).encode()
    key = _key(project_id, file_id, job_id, fence, figures["dataset"])
    storage.put_bytes(key, content, "application/json")


def commit(session: Session, file_id: str, job_id: str, dataset: str, fence: int) -> int | None:
    """From now on the figures of this attempt are told; the fence of those before. The caller holds the job's row under
    that fence: its file cannot be deleted meanwhile."""
    committed = session.get(FileTruncation, (file_id, job_id, dataset))
    if committed is None:
        session.add(FileTruncation(file_id=file_id, job_id=job_id, dataset=dataset, fence=fence))
        session.flush()
        return None
    before, committed.fence = committed.fence, fence
    session.flush()
    return before


def drop(storage: Storage, project_id: str, file_id: str, job_id: str, fence: int, dataset: str) -> None:
    """Removes figures that are not committed, or not any more."""
    storage.delete(_key(project_id, file_id, job_id, fence, dataset))


def committed(session: Session, file: File) -> Sequence[FileTruncation]:
    """Of the latest jobs on the file, the latest first; a job's training file before its validation file."""
    return repository.truncations(session, file.id, MOST_JOBS)


def read(storage: Storage, file: File, committed: Sequence[FileTruncation]) -> list[dict[str, Any]]:
    """Their figures."""
    found = []
    for each in committed:
        with suppress(FileNotFoundError):
            key = _key(file.project_id, file.id, each.job_id, each.fence, each.dataset)
            found.append(dict(json.loads(b"".join(storage.stream(key)))))
    return found


def to_keep(session: Session, project_id: str, file_id: str, job_id: str) -> list[str]:
    """Where the store has what is committed of a job, for `erase_rest`."""
    return [
        f"{_prefix(project_id, file_id, job_id)}/{fence}"
        for fence in repository.truncation_fences(session, file_id, job_id)
    ]


def erase_rest(storage: Storage, project_id: str, file_id: str, job_id: str, keep: Sequence[str]) -> None:
    """Removes what attempts at an ended job stored and never committed."""
    storage.delete_prefix(_prefix(project_id, file_id, job_id), keep=keep)


def _key(project_id: str, file_id: str, job_id: str, fence: int, dataset: str) -> str:
    return f"{_prefix(project_id, file_id, job_id)}/{fence}/{dataset}.json"


def _prefix(project_id: str, file_id: str, job_id: str) -> str:
    return f"{prefix(project_id, file_id)}/truncation/{job_id}"
