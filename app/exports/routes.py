"""/v1/models/{id}/exports."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response
from sqlalchemy.orm import Session

from app.auth.service import Caller
from app.db.session import after_commit
from app.exports import repository, service
from app.exports.schemas import (
    CreateExport,
    ExportDeleted,
    ExportFile,
    ExportFileList,
    ExportList,
    ExportOut,
    render,
)
from app.exports.tables import Export
from app.http.deps import QueueDep, Reader, Reading, StorageDep, Submitter, Writing
from app.http.downloads import A_FILE, AN_ARCHIVE
from app.models import bundles
from app.models import service as models
from app.models.bundles import ArchiveName

router = APIRouter(prefix="/models/{model_id}/exports", tags=["exports"])

ModelId = Annotated[str, Path(max_length=200)]
ExportId = Annotated[str, Path(max_length=64)]


@router.post("")
def create_export(
    body: CreateExport, session: Writing, caller: Submitter, queue: QueueDep, model_id: ModelId
) -> ExportOut:
    """Asks for the model in another form. A model has one export of a form: asked again, that one is the answer.

    It costs no privacy: a worker makes it from the released weights (and, for a student, from a public file).
    """
    model = models.get(session, caller.project_id, model_id)
    export, new = service.request(session, model, body.format, body.student)
    if new:
        after_commit(session, partial(queue.hint_export, export.id))
    return render(export)


@router.get("")
def list_exports(session: Reading, caller: Reader, model_id: ModelId) -> ExportList:
    """The model's exports, newest first."""
    model = models.get(session, caller.project_id, model_id)
    rows = session.scalars(repository.of_model(model).order_by(Export.id.desc()))
    return ExportList(data=[render(row) for row in rows])


@router.get("/{export_id}")
def retrieve_export(session: Reading, caller: Reader, model_id: ModelId, export_id: ExportId) -> ExportOut:
    """Status; once it has succeeded, its size, speed and agreement with the model."""
    return render(service.get(session, models.get(session, caller.project_id, model_id), export_id))


@router.delete("/{export_id}")
def delete_export(
    session: Writing, caller: Submitter, storage: StorageDep, model_id: ModelId, export_id: ExportId
) -> ExportDeleted:
    """Deletes an export and its bytes; the model stays."""
    model = models.get(session, caller.project_id, model_id)
    export = service.delete(session, model, export_id)
    after_commit(session, partial(storage.delete_prefix, service.prefix(model.storage_prefix, export.id)))
    return ExportDeleted(id=export.id)


@router.get("/{export_id}/files")
def list_export_files(session: Reading, caller: Reader, model_id: ModelId, export_id: ExportId) -> ExportFileList:
    """What the export holds."""
    export = _finished(session, caller, model_id, export_id)
    files = [ExportFile(path=file["path"], bytes=file["bytes"], sha256=file["sha256"]) for file in export.files or ()]
    return ExportFileList(data=files, archives=export.archives or {})


def _finished(session: Session, caller: Caller, model_id: str, export_id: str) -> Export:
    return service.get_finished(session, models.get(session, caller.project_id, model_id), export_id)


@router.head("/{export_id}/files/{path:path}", include_in_schema=False)
@router.get("/{export_id}/files/{path:path}", **A_FILE)
def download_export_file(
    request: Request,
    session: Reading,
    caller: Reader,
    storage: StorageDep,
    model_id: ModelId,
    export_id: ExportId,
    path: str,
) -> Response:
    """One file of the export. Range, If-Range and If-None-Match work; the ETag is its SHA-256."""
    export = _finished(session, caller, model_id, export_id)
    return bundles.send_file(request, storage, str(export.storage_prefix), export.files or (), path)


@router.head("/{export_id}/download", include_in_schema=False)
@router.get("/{export_id}/download", **AN_ARCHIVE)
def download_export(
    request: Request,
    session: Reading,
    caller: Reader,
    storage: StorageDep,
    model_id: ModelId,
    export_id: ExportId,
    format_: ArchiveName = "tar",
) -> Response:
    """The whole export as one archive. Range, If-Range and If-None-Match work; the ETag is its SHA-256."""
    export = _finished(session, caller, model_id, export_id)
    name = f"{export.model_id}-{export.format}"
    prefix, files, archives = str(export.storage_prefix), export.files or (), export.archives or {}
    return bundles.send_archive(request, storage, prefix, files, archives, name, format_)
