"""Uploads: begun, given parts, completed to a file, cancelled, expired, erased."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.auth import service as auth
from app.auth.service import Caller
from app.budgets import service as budgets
from app.db.base import now
from app.db.session import Database, after_commit
from app.errors import Conflict, InvalidRequest, NotFound, PayloadTooLarge
from app.files import service as files
from app.files.repository import lock_project
from app.files.schemas import UnitColumn
from app.files.tables import File
from app.ids import new_id
from app.settings import Settings
from app.storage import Storage
from app.uploads import repository
from app.uploads.schemas import MAX_PARTS, CreateUpload
from app.uploads.tables import Part, Upload

log = structlog.get_logger(__name__)

#: So often the parts of one upload are joined in vain, or at once: each time they are read and written once.
MAX_REFUSALS = 10
#: A part whose answer was lost is sent again: so many times its size an upload may hold.
_STORED_TIMES = 2
_AT_ONCE = 100

_ENDED = {
    "completed": "The upload is completed.",
    "cancelled": "The upload was cancelled.",
    "expired": "The upload has expired; begin another one.",
}


@dataclass(frozen=True, slots=True)
class Joined:
    """The bytes of all parts, stored as a file's. sha256, md5: in lower-case hexadecimal."""

    file_id: str
    sha256: str
    md5: str


def prefix(project_id: str, upload_id: str) -> str:
    """Where the parts of an upload are stored."""
    return f"projects/{project_id}/uploads/{upload_id}"


def part_key(upload: Upload, part_id: str) -> str:
    """Where the bytes of a part are stored."""
    return f"{prefix(upload.project_id, upload.id)}/{part_id}"


def create(
    session: Session,
    caller: Caller,
    body: CreateUpload,
    filename: str,
    settings: Settings,
    idempotency_key: str | None = None,
) -> Upload:
    """An upload that waits for its parts. What a file of it would be refused for is said now. An equal request that
    came before, by its key, is answered with its upload.

    Raises PayloadTooLarge, InvalidRequest, PermissionDenied, NotFound, Conflict (too_many_uploads,
    idempotency_mismatch, and upload_cancelled or upload_expired of the upload that the key began).
    """
    max_bytes = settings.max_upload_bytes
    if body.bytes > max_bytes:
        raise PayloadTooLarge(
            "file_too_large", f"This server takes files of up to {max_bytes} bytes.", param="bytes", max_bytes=max_bytes
        )
    lock_project(session, caller.project_id)
    upload = Upload(
        id=new_id("upload"),
        project_id=caller.project_id,
        status="pending",
        filename=filename,
        bytes=body.bytes,
        purpose=body.purpose,
        public=body.public,
        privacy_budget=body.privacy_budget or None,
        privacy_unit=None if body.privacy_unit is None else body.privacy_unit.model_dump(),
        expires_after=None if body.expires_after is None else body.expires_after.seconds,
        created_at=(created_at := session.scalars(select(now())).one()),
        expires_at=created_at + settings.upload_seconds,
        refusals=0,
        idempotency_key=idempotency_key,
    )
    check(caller, upload)
    if idempotency_key is not None:
        before = repository.find_by_idempotency_key(session, caller.project_id, idempotency_key)
        if before is not None:
            return _begun_before(current(session, before), upload)
    if upload.privacy_budget is not None:
        budgets.get(session, caller.project_id, upload.privacy_budget)
    if repository.pending(session, caller.project_id) >= settings.max_pending_uploads:
        raise Conflict(
            "too_many_uploads",
            f"{settings.max_pending_uploads} uploads of this project wait for parts; complete or cancel some.",
        )
    session.add(upload)
    session.flush()
    return upload


def _begun_before(before: Upload, upload: Upload) -> Upload:
    asked = ("filename", "bytes", "purpose", "public", "privacy_budget", "privacy_unit", "expires_after")
    if any(getattr(before, name) != getattr(upload, name) for name in asked):
        raise Conflict("idempotency_mismatch", "This Idempotency-Key was used for another upload.")
    if before.status != "completed":
        require_pending(before)
    return before


def check(caller: Caller, upload: Upload) -> None:
    """Raises what the caller may not ask for of the file; asked again of whoever completes it."""
    files.check(
        caller,
        purpose=upload.purpose,
        public=upload.public,
        privacy_unit=_unit(upload),
        privacy_budget=upload.privacy_budget,
    )


def get(session: Session, project_id: str, upload_id: str) -> Upload:
    """The project's upload of that id, as of now; NotFound without one."""
    return current(session, repository.find(session, project_id, upload_id))


def file_of(session: Session, upload: Upload) -> File | None:
    """What a completed upload became, unless it was deleted."""
    if upload.file_id is None:
        return None
    try:
        return files.get(session, upload.project_id, upload.file_id)
    except NotFound:
        return None


def require_pending(upload: Upload) -> None:
    """Conflict (upload_completed, upload_cancelled, upload_expired) where it takes nothing more."""
    if upload.status != "pending":
        raise Conflict(f"upload_{upload.status}", _ENDED[upload.status])


def add_part(session: Session, project_id: str, upload_id: str, part_id: str, size: int) -> Part:
    """A part whose bytes are stored. Conflict, InvalidRequest (too_many_parts, too_many_bytes)."""
    upload = current(session, repository.lock(session, project_id, upload_id))
    require_pending(upload)
    count, stored = repository.stored(session, upload_id)
    if count >= MAX_PARTS:
        raise InvalidRequest("too_many_parts", f"An upload has at most {MAX_PARTS} parts.")
    if stored + size > _STORED_TIMES * upload.bytes:
        raise InvalidRequest(
            "too_many_bytes", f"The parts have more than {_STORED_TIMES} times the bytes that were announced."
        )
    part = Part(id=part_id, upload_id=upload_id, bytes=size, created_at=session.scalars(select(now())).one())
    session.add(part)
    session.flush()
    return part


def to_join(
    session: Session, caller: Caller, upload_id: str, part_ids: Sequence[str], md5: str | None
) -> tuple[Upload, list[str]]:
    """The upload, and the keys of these parts; no keys where it was completed with the same ones before.

    With keys it counts as refused from now on: tries that come at once are bounded, too. What ends otherwise is taken
    back by `forget_try`.

    Raises NotFound, Conflict, InvalidRequest (duplicate_part, upload_size_mismatch, md5_mismatch).
    """
    upload = current(session, repository.lock(session, caller.project_id, upload_id))
    if _was_completed(upload, part_ids, md5):
        return upload, []
    require_pending(upload)
    check(caller, upload)
    if upload.refusals >= MAX_REFUSALS:
        raise Conflict(
            "upload_refused_too_often",
            f"This upload was refused {MAX_REFUSALS} times at its end, or is still being tried; begin another one.",
        )
    if len(set(part_ids)) != len(part_ids):
        raise InvalidRequest("duplicate_part", "A part is named twice.", param="part_ids")
    sizes = {part.id: part.bytes for part in session.scalars(repository.parts(upload_id))}
    if not sizes.keys() >= set(part_ids):
        raise NotFound("upload_part", param="part_ids")
    total = sum(sizes[part_id] for part_id in part_ids)
    if total != upload.bytes:
        raise InvalidRequest(
            "upload_size_mismatch",
            f"The parts have {total} bytes, {upload.bytes} were announced.",
            param="part_ids",
            bytes=total,
        )
    _require_md5(upload, part_ids, md5)  # in this order they were joined before: they need not be read again
    upload.refusals += 1
    session.flush()
    return upload, [part_key(upload, part_id) for part_id in part_ids]


def forget_try(session: Session, project_id: str, upload_id: str) -> None:
    """A try of `to_join` came to nothing for which the upload is not to blame."""
    upload = current(session, repository.lock(session, project_id, upload_id))
    if upload.status == "pending":
        upload.refusals -= 1
        session.flush()


def complete(
    session: Session,
    caller: Caller,
    upload_id: str,
    part_ids: Sequence[str],
    md5: str | None,
    joined: Joined,
    erase_parts: Callable[[str], object],
) -> tuple[Upload, File | None]:
    """Makes the upload a file of these bytes. Where an equal request came first, its file is the answer: then its id is
    not `joined.file_id`, and the caller removes the bytes.

    Raises Conflict, and what `files.create` raises: then the upload stays as it is, see `note_refusal`.
    """
    upload = current(session, repository.lock(session, caller.project_id, upload_id))
    if _was_completed(upload, part_ids, md5):
        return upload, file_of(session, upload)
    require_pending(upload)
    new = files.NewFile(
        id=joined.file_id,
        filename=upload.filename,
        bytes=upload.bytes,
        sha256=joined.sha256,
        purpose=upload.purpose,
        public=upload.public,
        privacy_budget=upload.privacy_budget,
        privacy_unit=_unit(upload),
        expires_after=upload.expires_after,
    )
    file = files.create(session, caller, new)
    upload.status, upload.file_id = "completed", file.id
    upload.joined, upload.md5 = _order(part_ids), joined.md5
    session.flush()
    after_commit(session, lambda: erase_parts(upload_id))
    return upload, file


def note_refusal(session: Session, project_id: str, upload_id: str, part_ids: Sequence[str], md5: str) -> None:
    """These parts came to that MD5, and the upload could not be completed with them."""
    upload = current(session, repository.lock(session, project_id, upload_id))
    if upload.status == "pending":
        upload.joined, upload.md5 = _order(part_ids), md5
        session.flush()


def md5_mismatch() -> InvalidRequest:
    """What a complete with another MD5 is told."""
    return InvalidRequest("md5_mismatch", "The parts do not have this MD5, in this order.", param="md5")


def cancel(session: Session, project_id: str, upload_id: str) -> Upload:
    """Ends an upload; cancelling twice changes nothing. Its parts go after the commit, see `erase`."""
    upload = current(session, repository.lock(session, project_id, upload_id))
    if upload.status != "cancelled":
        require_pending(upload)
        upload.status = "cancelled"
        session.flush()
    return upload


def erase(database: Database, storage: Storage, project_id: str, upload_id: str) -> None:
    """Removes the parts of an upload that has ended. Interrupted, it is repeated by `sweep`."""
    storage.delete_prefix(prefix(project_id, upload_id))
    with database.writing() as session:
        repository.forget_parts(session, upload_id)
        session.get_one(Upload, upload_id).erased_at = session.scalars(select(now())).one()


def sweep(database: Database, storage: Storage) -> None:
    """Ends uploads whose time is over, and removes the parts of ended ones."""
    with database.writing() as session:
        for upload_id in repository.expire(session):
            log.info("upload_expired", upload_id=upload_id)
    with database.reading() as session:
        ended = repository.to_erase(session, _AT_ONCE)
    for project_id, upload_id in ended:
        erase(database, storage, project_id, upload_id)


def sweep_orphans(database: Database, storage: Storage) -> int:
    """Removes parts that were stored after their upload's were erased, by a process that then died; of how many."""
    with database.reading() as session:
        projects = auth.project_ids(session)
    removed = 0
    for project_id in projects:
        found = storage.names(f"projects/{project_id}/uploads")
        for start in range(0, len(found), _AT_ONCE):
            several = found[start : start + _AT_ONCE]
            with database.reading() as session:
                orphans = set(several) - repository.with_parts(session, several)
            for upload_id in sorted(orphans):
                storage.delete_prefix(prefix(project_id, upload_id))
                log.warning("orphaned_parts_removed", upload_id=upload_id)
                removed += 1
    return removed


def current(session: Session, upload: Upload | None) -> Upload:
    """An upload whose time is over has expired, whether or not a sweep has come by."""
    if upload is None:
        raise NotFound("upload")
    if upload.status == "pending" and upload.expires_at < session.scalars(select(now())).one():
        session.expunge(upload)
        upload.status = "expired"
    return upload


def _was_completed(upload: Upload, part_ids: Sequence[str], md5: str | None) -> bool:
    """Whether an equal request completed it. InvalidRequest (md5_mismatch) where only the MD5 differs."""
    if upload.status != "completed" or upload.joined != _order(part_ids):
        return False
    _require_md5(upload, part_ids, md5)
    return True


def _require_md5(upload: Upload, part_ids: Sequence[str], md5: str | None) -> None:
    """InvalidRequest (md5_mismatch) where it is known that these parts have another one."""
    known = upload.md5 if upload.joined == _order(part_ids) else None
    if md5 is not None and known is not None and md5.lower() != known:
        raise md5_mismatch()


def _order(part_ids: Sequence[str]) -> str:
    """These parts, in this order, as `Upload.joined` has them."""
    return hashlib.sha256(",".join(part_ids).encode()).hexdigest()


def _unit(upload: Upload) -> UnitColumn | None:
    return None if upload.privacy_unit is None else UnitColumn.model_validate(upload.privacy_unit)
