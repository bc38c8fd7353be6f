"""/v1/uploads."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from anyio import CancelScope
from fastapi import APIRouter, Header, Path, Request
from fastapi.concurrency import run_in_threadpool

from app.db.session import after_commit
from app.errors import ApiError, ServiceUnavailable
from app.files import service as files
from app.files.tables import File
from app.files.upload import Form, display_name, drain, receive
from app.http.deps import DatabaseDep, QueueDep, Reader, Reading, SettingsDep, StorageDep, Submitter, Writing
from app.http.pagination import Page, paginate
from app.ids import new_id
from app.uploads import repository, service
from app.uploads.joining import Mismatch, join
from app.uploads.schemas import (
    MAX_PART_BYTES,
    CompleteUpload,
    CreateUpload,
    PartList,
    PartOut,
    UploadList,
    UploadOut,
    render,
    render_part,
)
from app.uploads.tables import Part, Upload

router = APIRouter(prefix="/uploads", tags=["uploads"])

UploadId = Annotated[str, Path(max_length=64)]

_PART = Form(file="data", noun="part")

_PART_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("")
def create_upload(
    body: CreateUpload,
    session: Writing,
    caller: Submitter,
    settings: SettingsDep,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> UploadOut:
    """Begins an upload in parts, for files that are too big for one request."""
    upload = service.create(session, caller, body, display_name(body.filename), settings, idempotency_key)
    return render(upload, service.file_of(session, upload))


@router.get("")
def list_uploads(session: Reading, caller: Reader, page: Page) -> UploadList:
    """The project's uploads, those that have ended included."""
    uploads, has_more = paginate(session, repository.readable(caller.project_id), Upload, page)
    shown = [render(service.current(session, each), service.file_of(session, each)) for each in uploads]
    return UploadList(data=shown, has_more=has_more)


@router.get("/{upload_id}")
def retrieve_upload(session: Reading, caller: Reader, upload_id: UploadId) -> UploadOut:
    """One upload."""
    upload = service.get(session, caller.project_id, upload_id)
    return render(upload, service.file_of(session, upload))


@router.get("/{upload_id}/parts")
def list_parts(session: Reading, caller: Reader, page: Page, upload_id: UploadId) -> PartList:
    """What has arrived, for a client that goes on where it was interrupted; nothing of an upload that has ended."""
    service.get(session, caller.project_id, upload_id)
    parts, has_more = paginate(session, repository.parts(upload_id), Part, page)
    return PartList(data=[render_part(part) for part in parts], has_more=has_more)


@router.post("/{upload_id}/parts", openapi_extra=_PART_FORM)
async def create_part(
    request: Request, caller: Submitter, database: DatabaseDep, storage: StorageDep, upload_id: UploadId
) -> PartOut:
    """Adds a part, of at most 64 MiB. Parts may come side by side and in any order."""

    def find() -> Upload:
        with database.reading() as session:
            upload = service.get(session, caller.project_id, upload_id)
        service.require_pending(upload)
        return upload

    try:
        upload = await run_in_threadpool(find)
    except ApiError:
        await drain(request)
        raise
    part_id = new_id("part")
    key = service.part_key(upload, part_id)
    received = await receive(request, storage, key, _PART, min(MAX_PART_BYTES, upload.bytes))

    def add() -> Part:  # cleans up by itself: whoever waits for it may be cancelled once the row is there
        try:
            with database.writing() as session:
                return service.add_part(session, caller.project_id, upload_id, part_id, received.bytes)
        except ApiError:
            storage.delete(key)
            raise

    return render_part(await run_in_threadpool(add))


@router.post("/{upload_id}/complete")
async def complete_upload(
    body: CompleteUpload,
    caller: Submitter,
    database: DatabaseDep,
    storage: StorageDep,
    queue: QueueDep,
    upload_id: UploadId,
) -> UploadOut:
    """Joins the parts to a file, which is then read like any other. Asked again with the same parts in the same order,
    and no other MD5, it is the same.

    No unit of work is open while bytes are copied.
    """

    def find() -> tuple[Upload, list[str], File | None]:
        with database.writing() as session:
            upload, keys = service.to_join(session, caller, upload_id, body.part_ids, body.md5)
            return upload, keys, service.file_of(session, upload)

    def refused(md5: str) -> None:
        with database.writing() as session:
            service.note_refusal(session, caller.project_id, upload_id, body.part_ids, md5)

    def forget_try() -> None:
        with database.writing() as session:
            service.forget_try(session, caller.project_id, upload_id)

    upload, keys, file = await run_in_threadpool(find)
    if not keys:
        return render(upload, file)
    file_id = new_id("file")
    try:
        try:
            digests = await join(storage, keys, files.source_key(caller.project_id, file_id), body.md5)
        except Mismatch as mismatch:
            await run_in_threadpool(refused, mismatch.md5)
            raise service.md5_mismatch() from None
        except BaseException:  # a client that is gone, too
            with CancelScope(shield=True):
                await run_in_threadpool(forget_try)
            raise
    except FileNotFoundError:  # the upload has ended meanwhile: completed by an equal request, or for good
        upload, keys, file = await run_in_threadpool(find)
        if keys:
            await run_in_threadpool(forget_try)
            raise ServiceUnavailable("storage_unavailable", "A part could not be read; try again.") from None
        return render(upload, file)
    except OSError as error:
        raise ServiceUnavailable("storage_unavailable", "The file could not be stored; try again.") from error

    def complete() -> tuple[Upload, File | None]:
        try:
            with database.writing() as session:
                upload, file = service.complete(
                    session,
                    caller,
                    upload_id,
                    body.part_ids,
                    body.md5,
                    service.Joined(file_id, digests.sha256, digests.md5),
                    partial(service.erase, database, storage, caller.project_id),
                )
                if file is not None and file.id == file_id:
                    after_commit(session, lambda: queue.hint_file(file_id))
            return upload, file
        except ApiError:
            refused(digests.md5)
            raise
        except Exception:
            forget_try()
            raise
        finally:
            files.discard(database, storage, caller.project_id, file_id)

    upload, file = await run_in_threadpool(complete)
    return render(upload, file)


@router.post("/{upload_id}/cancel")
def cancel_upload(
    session: Writing, caller: Submitter, database: DatabaseDep, storage: StorageDep, upload_id: UploadId
) -> UploadOut:
    """Ends an upload, and removes its parts."""
    upload = service.cancel(session, caller.project_id, upload_id)
    after_commit(session, lambda: service.erase(database, storage, caller.project_id, upload_id))
    return render(upload, None)
