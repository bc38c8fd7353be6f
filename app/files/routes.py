"""/v1/files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError

from app.db.session import after_commit
from app.files import repository, service, truncation
from app.files.limits import DEFAULT_RECORDS_PER_UNIT, MAX_RECORDS_PER_UNIT
from app.files.schemas import (
    FileDeleted,
    FileList,
    FileOut,
    FileReport,
    FileUnits,
    UploadForm,
    render,
    render_report,
    render_units,
)
from app.files.tables import File
from app.files.upload import Form, receive
from app.http.deps import Admin, DatabaseDep, QueueDep, Reader, Reading, SettingsDep, StorageDep, Submitter, Writing
from app.http.downloads import A_FILE, Download, respond
from app.http.pagination import Page, paginate
from app.ids import new_id

router = APIRouter(tags=["files"])

_FIELDS = frozenset(field.alias or name for name, field in UploadForm.model_fields.items())

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "A dataset, see the README. Last in the form, a refusal comes at once.",
                        },
                        **UploadForm.model_json_schema(by_alias=True)["properties"],
                    },
                }
            }
        },
    }
}


@router.post("/files", openapi_extra=_FORM)
async def create_file(
    request: Request,
    caller: Submitter,
    settings: SettingsDep,
    database: DatabaseDep,
    storage: StorageDep,
    queue: QueueDep,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> FileOut:
    """Uploads a dataset; it is then read in the background, until its status is `processed` or `error`.

    No unit of work is open while bytes arrive: the file's row is made once they are stored.
    """

    def check(fields: Mapping[str, str]) -> UploadForm:
        form = _form(fields)
        service.check(
            caller,
            purpose=form.purpose,
            public=form.public,
            privacy_unit=form.unit(),
            privacy_budget=form.privacy_budget,
        )
        return form

    file_id = new_id("file")
    key = service.source_key(caller.project_id, file_id)
    received = await receive(request, storage, key, Form(fields=_FIELDS, check=check), settings.max_upload_bytes)
    form = check(received.fields)

    def create() -> File:
        try:
            with database.writing() as session:
                file = service.create(
                    session,
                    caller,
                    service.NewFile(
                        id=file_id,
                        filename=received.filename,
                        bytes=received.bytes,
                        sha256=received.sha256,
                        purpose=form.purpose,
                        public=form.public,
                        privacy_budget=form.privacy_budget or None,
                        privacy_unit=form.unit(),
                        expires_after=form.expires_after_seconds,
                    ),
                    idempotency_key,
                )
                if file.id == file_id:
                    after_commit(session, lambda: queue.hint_file(file_id))
            return file
        finally:
            service.discard(database, storage, caller.project_id, file_id)

    file = await run_in_threadpool(create)
    return render(file)


def _form(fields: Mapping[str, str]) -> UploadForm:
    try:
        return UploadForm.model_validate(dict(fields))
    except ValidationError as error:
        # Rendered like FastAPI's own: the field's name, never what it held.
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from None


@router.get("/files")
def list_files(
    session: Reading, caller: Reader, page: Page, purpose: Annotated[str | None, Query(max_length=32)] = None
) -> FileList:
    """The project's files."""
    statement = repository.readable(caller.project_id)
    if purpose is not None:
        statement = statement.where(File.purpose == purpose)
    files, has_more = paginate(session, statement, File, page)
    return FileList(data=[render(file) for file in files], has_more=has_more)


@router.get("/files/{file_id}")
def retrieve_file(session: Reading, caller: Reader, file_id: str) -> FileOut:
    """One file."""
    return render(service.get(session, caller.project_id, file_id))


@router.get("/files/{file_id}/units")
def retrieve_units(
    session: Writing,
    caller: Admin,
    file_id: str,
    max_records_per_unit: Annotated[int, Query(ge=1, le=MAX_RECORDS_PER_UNIT)] = DEFAULT_RECORDS_PER_UNIT,
) -> FileUnits:
    """How many records a bound on records per unit leaves out of each step: counts of private rows, so admin keys only,
    and each look is an entry of the ledger of the file's budget."""
    file = service.get(session, caller.project_id, file_id)
    service.look(session, caller, file, "report_read")
    return render_units(file, max_records_per_unit)


@router.get("/files/{file_id}/report")
def retrieve_report(caller: Admin, database: DatabaseDep, storage: StorageDep, file_id: str) -> FileReport:
    """The owner's report: exact figures of private rows that no budget covers, so admin keys only. Each look is an
    entry of the ledger of the file's budget."""
    with database.reading() as session:
        file = service.get(session, caller.project_id, file_id)
        committed = truncation.committed(session, file)
    report, cut = service.report_of(storage, file), truncation.read(storage, file, committed)
    with database.writing() as session:
        service.look(session, caller, file, "report_read")
    return render_report(file, report, cut)


@router.delete("/files/{file_id}")
def delete_file(
    session: Writing, caller: Submitter, database: DatabaseDep, storage: StorageDep, file_id: str
) -> FileDeleted:
    """Deletes a file and its bytes. What jobs have spent on it stays in its budget's ledger."""
    file = service.delete(session, caller.project_id, file_id)
    after_commit(session, lambda: service.erase(database, storage, file.project_id, file.id))
    return FileDeleted(id=file.id)


def _content(request: Request, session: Any, caller: Any, storage: Any, file_id: str) -> Response:
    file = service.get(session, caller.project_id, file_id)
    return respond(
        request,
        Download(
            filename=file.filename,
            media_type="application/octet-stream",
            size=file.bytes,
            sha256=file.sha256,
            read=lambda start, end: storage.stream(file.source_key, start, end),
        ),
    )


@router.get("/files/{file_id}/content", **A_FILE)
def retrieve_content(request: Request, session: Writing, caller: Admin, storage: StorageDep, file_id: str) -> Response:
    """The bytes as they were uploaded: raw private rows, so admin keys only. Each look is an entry of the ledger of the
    file's budget."""
    answer = _content(request, session, caller, storage, file_id)
    if answer.status_code in (200, 206):
        service.look(session, caller, service.get(session, caller.project_id, file_id), "content_read")
    return answer


@router.head("/files/{file_id}/content", include_in_schema=False)
def head_content(request: Request, session: Reading, caller: Admin, storage: StorageDep, file_id: str) -> Response:
    """The headers of the same."""
    return _content(request, session, caller, storage, file_id)
