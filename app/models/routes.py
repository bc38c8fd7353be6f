"""/v1/models, /v1/base_models, /v1/tasks, and the key that signs the models' privacy reports."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.convertors import Convertor, register_url_convertor

from app.catalog.memory import MOST_BATCH_TOKENS
from app.catalog.tasks import TASKS
from app.db.session import after_commit
from app.errors import InvalidRequest, NotFound
from app.http.deps import (
    DatabaseDep,
    Reader,
    Reading,
    ReportKeysDep,
    SettingsDep,
    StorageDep,
    Submitter,
    Writing,
)
from app.http.downloads import A_FILE, AN_ARCHIVE
from app.http.pagination import PageParams
from app.http.problems import answered
from app.models import bundles, listing, report_page, repository, service
from app.models.bundles import ArchiveName
from app.models.discovery import FINE_TUNED
from app.models.schemas import (
    BaseModelList,
    BaseModelOut,
    ModelDeleted,
    ModelFile,
    ModelFileList,
    ModelList,
    ModelOut,
    SigningKey,
    TaskList,
    render,
    render_as_model,
    render_base,
    render_task,
)
from app.models.tables import Model

router = APIRouter(tags=["models"])

#: Before the routes of what lies below a model: a base ORGANISATION/exports is none of those.
bases_in_folders = APIRouter(tags=["models"])

ModelId = Annotated[str, Path(max_length=200)]

_A_REPORT: dict[str, Any] = answered(None, "application/json", "text/html")

_IN_FOLDER = "in_folder"


class _InFolder(Convertor[str]):
    """ORGANISATION/NAME; a model that was trained here has no slash in its id."""

    regex = f"(?!{FINE_TUNED})[^/]+/[^/]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor(_IN_FOLDER, _InFolder())


@router.get("/base_models")
def list_base_models(
    _caller: Reader,
    settings: SettingsDep,
    after: Annotated[str | None, Query(max_length=200, description="The last id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    task: Annotated[str | None, Query(max_length=64, description="Only bases that can learn it, best first.")] = None,
    num_units: Annotated[int | None, Query(ge=1, description="People or records to train on; with `task`.")] = None,
    epsilon: Annotated[
        float | None, Query(gt=0, allow_inf_nan=False, description="0 < ε of the job; with `task`.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"] | None, Query(description="What it will train on; with `task`.")] = None,
    text_pair: Annotated[bool, Query(description="Whether each record has two texts; with `task`.")] = False,
) -> BaseModelList:
    """What jobs can start from, in pages: by id, or with `task` in the order of a recommendation, with reasons."""
    asked = None if task is None else listing.Question(task, num_units, epsilon, device, text_pair)
    if asked is None and (num_units, epsilon, device, text_pair) != (None, None, None, False):
        raise InvalidRequest("invalid_request", "A recommendation is for a task: name one.", param="task")
    entries, has_more = listing.page_of(service.bases(settings), PageParams(after, limit), asked, settings)
    tokens = settings.max_physical_batch_tokens or MOST_BATCH_TOKENS["cpu"]
    return BaseModelList(data=[render_base(base, tokens, why) for base, why in entries], has_more=has_more)


@router.get("/base_models/{base_model_id:path}")
def retrieve_base_model(
    caller: Reader, database: DatabaseDep, settings: SettingsDep, base_model_id: ModelId
) -> BaseModelOut:
    """One of them; or a model that a job of this project made, as the base of another job."""
    base = service.find_base_for(database, settings, caller.project_id, base_model_id)
    if base is None:
        raise NotFound("model")
    return render_base(base, settings.max_physical_batch_tokens or MOST_BATCH_TOKENS["cpu"])


@router.get("/tasks")
def list_tasks(_caller: Reader) -> TaskList:
    """What can be trained, and the columns that each task reads."""
    return TaskList(data=[render_task(task) for task in TASKS.values()])


@router.get("/models")
def list_models(session: Reading, caller: Reader, settings: SettingsDep) -> ModelList:
    """Bases and the project's own models; like the wire's, not in pages."""
    own = session.scalars(repository.readable(caller.project_id).order_by(Model.created_at.desc(), Model.id.desc()))
    return ModelList(data=[*(render_as_model(base.id) for base in service.bases(settings)), *map(render, own)])


@router.get("/models/{model_id}/files")
def list_model_files(session: Reading, caller: Reader, model_id: ModelId) -> ModelFileList:
    """What the bundle holds."""
    model = service.get(session, caller.project_id, model_id)
    files = [ModelFile(path=file["path"], bytes=file["bytes"], sha256=file["sha256"]) for file in model.files]
    return ModelFileList(data=files, archives=model.archives)


@router.head("/models/{model_id}/files/{path:path}", include_in_schema=False)
@router.get("/models/{model_id}/files/{path:path}", **A_FILE)
def download_model_file(
    request: Request, session: Reading, caller: Reader, storage: StorageDep, model_id: ModelId, path: str
) -> Response:
    """One file of the bundle. Range, If-Range and If-None-Match work; the ETag is its SHA-256."""
    model = service.get(session, caller.project_id, model_id)
    return bundles.send_file(request, storage, model.storage_prefix, model.files, path)


@router.head("/models/{model_id}/download", include_in_schema=False)
@router.get("/models/{model_id}/download", **AN_ARCHIVE)
def download_model(
    request: Request,
    session: Reading,
    caller: Reader,
    storage: StorageDep,
    model_id: ModelId,
    format_: ArchiveName = "tar",
) -> Response:
    """The whole bundle as one archive. Range, If-Range and If-None-Match work; the ETag is its SHA-256."""
    model = service.get(session, caller.project_id, model_id)
    return bundles.send_archive(request, storage, model.storage_prefix, model.files, model.archives, model.id, format_)


def _prefers_page(accept: str) -> bool:
    """Whether HTML is named, and JSON is not named with at least the same weight."""
    weights = {}
    for entry in accept.lower().split(","):
        media_type, *parameters = (part.strip() for part in entry.split(";"))
        weight = next((value[2:] for value in parameters if value.startswith("q=")), "1")
        weights[media_type] = float(weight) if re.fullmatch(r"[01](\.\d{0,3})?", weight) else 0.0
    return weights.get("text/html", 0.0) > weights.get("application/json", 0.0)


@router.get("/models/{model_id}/privacy_report", response_class=Response, **_A_REPORT)
def retrieve_privacy_report(request: Request, session: Reading, caller: Reader, model_id: ModelId) -> Response:
    """The signed report as JSON; with `Accept: text/html` as a page for people."""
    model = service.get(session, caller.project_id, model_id)
    headers = {"vary": "accept", "cache-control": "private, no-cache", "x-content-type-options": "nosniff"}
    if not _prefers_page(request.headers.get("accept", "")):
        return JSONResponse(model.privacy_report, headers=headers)
    headers["content-security-policy"] = report_page.CONTENT_SECURITY_POLICY
    return HTMLResponse(report_page.render(model.id, model.privacy_report), headers=headers)


@router.get("/privacy/signing_key")
def retrieve_signing_key(_caller: Reader, keys: ReportKeysDep) -> SigningKey:
    """The public key to check privacy reports of this server with. Keep a copy apart from the server."""
    return SigningKey(public_key=keys.public_key)


# Below the longer paths: the id of a base may hold a slash, so this one takes whatever is left.


@bases_in_folders.get(f"/models/{{model_id:{_IN_FOLDER}}}", include_in_schema=False)
@router.get("/models/{model_id:path}")
def retrieve_model(session: Reading, caller: Reader, settings: SettingsDep, model_id: ModelId) -> ModelOut:
    """A model of the project, with its metrics and its privacy report; or a base."""
    if service.offers(settings, model_id):
        return render_as_model(model_id)
    return render(service.get(session, caller.project_id, model_id), full=True)


@router.delete("/models/{model_id:path}")
def delete_model(
    session: Writing,
    caller: Submitter,
    settings: SettingsDep,
    database: DatabaseDep,
    storage: StorageDep,
    model_id: ModelId,
) -> ModelDeleted:
    """Deletes a model and its bytes. What its job spent stays in the budget's ledger."""
    model: Any = service.delete(session, settings, caller.project_id, model_id)
    identifier = model.id
    after_commit(session, lambda: service.erase(database, storage, identifier))
    return ModelDeleted(id=identifier)
