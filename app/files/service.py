"""Files: made from what was received, attached to a budget, held by jobs, deleted, erased."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth.service import Caller
from app.budgets import service as budgets
from app.db.base import now
from app.db.session import Database
from app.errors import Conflict, InvalidRequest, NotFound, PermissionDenied
from app.files import repository
from app.files.limits import MAX_LABEL_LISTS, MAX_RECEIVING_SECONDS
from app.files.processing import process, report_key
from app.files.schemas import UnitColumn
from app.files.tables import File, FileUse
from app.ids import made_at
from app.storage import Storage

__all__ = [
    "NewFile",
    "create",
    "delete",
    "discard",
    "erase",
    "files_to_process",
    "get",
    "hold",
    "look",
    "note_labels",
    "process",
    "release",
    "report_of",
    "sweep",
    "sweep_orphans",
]

log = structlog.get_logger(__name__)

FINE_TUNE = "fine-tune"
#: Rows that a sweep takes at once.
_AT_ONCE = 100

#: No upload takes so long, see `app.files.upload`: whatever is older and has no row will never get one.
_ORPHAN_SECONDS = 2 * MAX_RECEIVING_SECONDS


@dataclass(frozen=True, slots=True)
class NewFile:
    """An upload whose bytes are stored. privacy_budget: an id, or None for the one that the bytes had, else the
    project's own. privacy_unit: None for the one that the bytes have, else the record. expires_after: seconds, or
    None."""

    id: str
    filename: str
    bytes: int
    sha256: str
    purpose: str
    public: bool = False
    privacy_budget: str | None = None
    privacy_unit: UnitColumn | None = None
    expires_after: int | None = None


def prefix(project_id: str, file_id: str) -> str:
    """Where everything of a file is stored."""
    return f"projects/{project_id}/files/{file_id}"


def source_key(project_id: str, file_id: str) -> str:
    """Where its bytes are stored as uploaded."""
    return f"{prefix(project_id, file_id)}/source"


def check(
    caller: Caller, *, purpose: str, public: bool, privacy_unit: UnitColumn | None, privacy_budget: str | None
) -> None:
    """What can be refused before the bytes have arrived."""
    if purpose != FINE_TUNE:
        raise InvalidRequest("purpose_not_supported", f"The purpose must be `{FINE_TUNE}`.", param="purpose")
    if public and not caller.may("admin"):
        raise PermissionDenied("insufficient_scope", "Declaring a file public needs an admin key.", param="public")
    if public and privacy_budget:
        raise InvalidRequest("invalid_request", "A public file has no privacy budget.", param="privacy_budget")
    if public and privacy_unit is not None and privacy_unit.column is not None:
        raise InvalidRequest("invalid_request", "A public file has no privacy unit.", param="privacy_unit")


def create(session: Session, caller: Caller, new: NewFile, idempotency_key: str | None = None) -> File:
    """The file's row, attached to its budget. An equal request that came before, by its key, is answered with its
    file: then the id is not `new.id`, and the caller removes the bytes.

    Raises Conflict (idempotency_mismatch, file_deleted, was_private, budget_mismatch, privacy_unit_mismatch),
    PermissionDenied, NotFound (privacy_budget), InvalidRequest (privacy_unit_mismatch) where the budget fixes another
    unit.
    """
    repository.lock_project(session, caller.project_id)
    if idempotency_key is not None:
        before = repository.find_by_idempotency_key(session, caller.project_id, idempotency_key)
        if before is not None:
            if not _same(before, new):
                raise Conflict("idempotency_mismatch", "This Idempotency-Key was used for another upload.")
            if before.deleted_at is not None:
                raise Conflict("file_deleted", "The file that this Idempotency-Key made was deleted; take another key.")
            return before
    created_at = session.scalars(select(now())).one()
    budget_id, unit_column = _attach(session, caller, new), _unit_column(session, caller, new)
    if budget_id is not None:
        fixed = budgets.get(session, caller.project_id, budget_id).privacy_unit["column"]
        budgets.require_unit(budget_id, fixed, unit_column, param="privacy_unit")
    file = File(
        id=new.id,
        project_id=caller.project_id,
        budget_id=budget_id,
        filename=new.filename,
        bytes=new.bytes,
        sha256=new.sha256,
        purpose=new.purpose,
        status="uploaded",
        public=new.public,
        unit_column=unit_column,
        source_key=source_key(caller.project_id, new.id),
        attempts=0,
        created_at=created_at,
        expires_at=None if new.expires_after is None else created_at + new.expires_after,
        idempotency_key=idempotency_key,
    )
    session.add(file)
    session.flush()
    return file


def _same(before: File, new: NewFile) -> bool:
    """Whether the upload asks for what the file is. What it leaves to the service may be anything."""
    expires_after = None if before.expires_at is None else round(before.expires_at - before.created_at)
    return (
        (before.sha256, before.filename, before.purpose, before.public, expires_after)
        == (new.sha256, new.filename, new.purpose, new.public, new.expires_after)
        and new.privacy_budget in (None, before.budget_id)
        and (new.privacy_unit is None or new.privacy_unit.column == before.unit_column)
    )


def _attach(session: Session, caller: Caller, new: NewFile) -> str | None:
    """The budget that jobs on these bytes are charged to; None for bytes declared public."""
    twin = repository.latest_private_twin(session, caller.project_id, new.sha256)
    own = budgets.default_for(session, caller.project_id)
    if new.public:
        if twin is not None:
            raise Conflict("was_private", "These bytes were protected before: they cannot be public.", param="public")
        _audit(session, caller, own.id, "public_declared", new)
        return None
    if new.privacy_budget is None:
        return twin.budget_id if twin is not None else own.id
    chosen = budgets.get(session, caller.project_id, new.privacy_budget)
    if twin is not None:
        if twin.budget_id != chosen.id:
            raise Conflict("budget_mismatch", "These bytes belong to another privacy budget.", param="privacy_budget")
    elif chosen.id != own.id:
        if not caller.may("admin"):
            raise PermissionDenied(
                "insufficient_scope", "Choosing a privacy budget needs an admin key.", param="privacy_budget"
            )
        _audit(session, caller, chosen.id, "file_attached", new)
    return chosen.id


def _unit_column(session: Session, caller: Caller, new: NewFile) -> str | None:
    """The column of the privacy unit. Bytes have one unit: jobs on the same rows under two units would be covered by
    neither as a whole, since what was spent on records says nothing about the person who owns several."""
    if new.public:
        return None
    asked = None if new.privacy_unit is None else new.privacy_unit.column
    before = repository.units_of_bytes(session, caller.project_id, new.sha256)
    if new.privacy_unit is None and len(before) == 1:
        return before.pop()
    if before - {asked}:
        raise Conflict(
            "privacy_unit_mismatch",
            "These bytes belong to a file with another privacy unit. Where no job has used that file, delete it first.",
            param="privacy_unit",
        )
    return asked


def _audit(session: Session, caller: Caller, budget_id: str, kind: Any, new: NewFile) -> None:
    # No digest: a ledger is shown to read keys, and a digest of private bytes is a test of guesses.
    budgets.record_act(session, budget_id, kind, actor=caller.key_id, details={"file_id": new.id})


def get(session: Session, project_id: str, file_id: str) -> File:
    """The project's file of that id; NotFound without one, or where it is deleted."""
    file = repository.find(session, project_id, file_id)
    if file is None:
        raise NotFound("file")
    return file


def look(session: Session, caller: Caller, file: File, kind: Literal["content_read", "report_read"]) -> None:
    """Notes in the ledger of a protected file's budget who looked at what no budget covers."""
    if file.budget_id is not None:
        budgets.record_act(session, file.budget_id, kind, actor=caller.key_id, details={"file_id": file.id})


def report_of(storage: Storage, file: File) -> dict[str, Any]:
    """The owner's report. NotFound (file_report) where the file is not processed, or was before there were reports."""
    key = report_key(file)
    if file.status == "processed":
        with suppress(FileNotFoundError):
            return dict(json.loads(b"".join(storage.stream(key))))
    raise NotFound("file_report")


def delete(session: Session, project_id: str, file_id: str) -> File:
    """Deletes a file; its row stays, and its ledger entries do. Its bytes go after the commit, see `erase`.

    Conflict (file_in_use) while a job needs it.
    """
    file = repository.lock(session, project_id, file_id)
    if file is None:
        raise NotFound("file")
    if repository.in_use(session, file.id):
        raise Conflict(
            "file_in_use", "A job or an export that has not ended needs this file; cancel or delete it, or wait."
        )
    file.deleted_at = session.scalars(select(now())).one()
    session.flush()
    return file


def hold(session: Session, file_id: str, job_id: str) -> None:
    """A job needs this file until it is released. NotFound where it was deleted meanwhile."""
    file = session.get(File, file_id, with_for_update={"key_share": True}, populate_existing=True)
    if file is None or file.deleted_at is not None:
        raise NotFound("file", param="training_file")
    if file.used_at is None:
        file.used_at = session.scalars(select(now())).one()
    if session.get(FileUse, (file_id, job_id)) is None:
        session.add(FileUse(file_id=file_id, job_id=job_id))
        session.flush()


def note_labels(session: Session, project_id: str, file_id: str, digest: str) -> None:
    """A list of classes was declared for this file's rows, and what a refusal tells is told of it. InvalidRequest
    (too_many_label_lists) where there were too many others before; NotFound."""
    file = repository.lock(session, project_id, file_id)
    if file is None:
        raise NotFound("file", param="training_file")
    known = file.label_lists or []
    if digest in known:
        return
    if len(known) >= MAX_LABEL_LISTS:
        raise InvalidRequest(
            "too_many_label_lists",
            f"{MAX_LABEL_LISTS} other lists of classes were declared for this file: take one of them, or an admin key. "
            "Each tells whether it holds all that is in the rows.",
            param="task.labels",
        )
    file.label_lists = [*known, digest]
    session.flush()


def release(session: Session, job_id: str) -> None:
    """The job has ended. Releasing twice changes nothing."""
    for use in session.scalars(select(FileUse).where(FileUse.job_id == job_id)):
        session.delete(use)
    session.flush()


def files_to_process(session: Session) -> Sequence[str]:
    """Ids of uploaded files that nobody processes: to be hinted again."""
    return repository.waiting(session, _AT_ONCE)


def discard(database: Database, storage: Storage, project_id: str, file_id: str) -> None:
    """Removes bytes that a unit of work was to make a file of, unless it did.

    For the thread that runs the unit of work: whoever waits for it may be cancelled, and then does not know how it
    ended. What cannot be removed is left to `sweep_orphans`.
    """
    try:
        with database.reading() as session:
            made = repository.known(session, [file_id])
        if not made:
            storage.delete_prefix(prefix(project_id, file_id))
    except Exception as error:  # what ended the unit of work is the answer
        log.warning("upload_not_discarded", file_id=file_id, error=type(error).__name__)


def erase(database: Database, storage: Storage, project_id: str, file_id: str) -> None:
    """Removes the bytes of a deleted file. Interrupted, it is repeated by `sweep`."""
    storage.delete_prefix(prefix(project_id, file_id))
    with database.writing() as session:
        repository.forget_truncations(session, file_id)
        file = session.get_one(File, file_id)
        file.erased_at = session.scalars(select(now())).one()


def sweep(database: Database, storage: Storage) -> None:
    """Deletes files whose time is over, and removes the bytes of deleted ones."""
    with database.writing() as session:
        for file in repository.expired(session, _AT_ONCE):
            if repository.in_use(session, file.id):
                continue  # a job took it after that query's snapshot; under the lock none can any more
            file.deleted_at = session.scalars(select(now())).one()
            log.info("file_expired", file_id=file.id)
    with database.reading() as session:
        deleted = repository.to_erase(session, _AT_ONCE)
    for project_id, file_id in deleted:
        erase(database, storage, project_id, file_id)


def sweep_orphans(database: Database, storage: Storage) -> int:
    """Removes uploads that were cut off between the store and their row, and what a worker that had lost its job stored
    for a file after its erasure; the number of files.

    An upload takes its id when it begins: what has none of the rows long after its time never gets one.
    """
    with database.reading() as session:
        projects = auth.project_ids(session)
    removed = 0
    for project_id in projects:
        old = [name for name in storage.names(f"projects/{project_id}/files") if _is_old(name)]
        for start in range(0, len(old), _AT_ONCE):
            several = old[start : start + _AT_ONCE]
            with database.reading() as session:
                orphans = set(several) - repository.kept(session, several)
            for file_id in sorted(orphans):
                storage.delete_prefix(prefix(project_id, file_id))
                log.warning("orphaned_upload_removed", file_id=file_id)
                removed += 1
    return removed


def _is_old(file_id: str) -> bool:
    try:
        return time.time() - made_at(file_id) > _ORPHAN_SECONDS
    except ValueError:
        return False
