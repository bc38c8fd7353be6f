"""Exports as their users have them: asked for, found, deleted. A worker's side is in `lifecycle`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.catalog import languages
from app.catalog.adaptations import AttentiveLora, Lora
from app.catalog.families import FAMILIES
from app.catalog.tasks import TASKS
from app.db.base import now
from app.errors import Conflict, InvalidRequest, NotFound
from app.exports import repository
from app.exports.schemas import ExportBlock, StudentBlock
from app.exports.tables import Export
from app.files import service as files
from app.files.tables import File
from app.ids import new_id
from app.models import service as models
from app.models.tables import Model
from app.privacy import report_format

#: Roles of a public file that a student can learn from: of a model that answers, and of one that writes.
_TEXT_ROLES, _WRITTEN_ROLES = ("text", "text_pair"), ("source", "target")
#: Adaptations that change matrices by low rank.
_LORA = (Lora.type, AttentiveLora.type)
_LANGUAGE_ROLES = ("source_lang", "target_lang")


def check_block(
    session: Session, project_id: str, formats: Sequence[str], student: StudentBlock | None, param: str
) -> None:
    """Refuses what no model could make: formats twice, a student without a public file, or a file without a student.

    param: where the block stands in the request. Raises InvalidRequest, NotFound.
    """
    if len(set(formats)) != len(formats):
        raise InvalidRequest("invalid_request", "A format is named twice.", param=f"{param}formats")
    if ("student" in formats) != (student is not None):
        raise InvalidRequest(
            "student_file_required",
            "A student is distilled on a public file: name both, or neither.",
            param=f"{param}student",
        )
    if student is not None:
        _public_file(session, project_id, student.training_file, f"{param}student.training_file")


def check_adaptation(formats: Sequence[str], phases: Sequence[Mapping[str, Any]], param: str) -> None:
    """InvalidRequest `format_not_supported` where an adapter is asked for of a job that trains none."""
    if "adapter" in formats and lora_rank(phases) is None:
        raise InvalidRequest(
            "format_not_supported", "Only what was trained with LoRA has an adapter to export.", param=param
        )


def lora_rank(phases: Sequence[Mapping[str, Any]]) -> int | None:
    """Of a job's phases, as its options are stated; None where it trained no LoRA."""
    ranks = [phase["adaptation"]["rank"] for phase in phases if phase["adaptation"].get("type") in _LORA]
    return max(ranks, default=None)


def phases_of(model: Model) -> list[Mapping[str, Any]]:
    """The phases that the model's own privacy report states."""
    options = _fact(model, report_format.OPTIONS)
    return list(options.get("phases", [])) if isinstance(options, Mapping) else []


def request(
    session: Session, model: Model, format_: str, student: StudentBlock | None, param: str = ""
) -> tuple[Export, bool]:
    """The model's export of that form, asked for now or before, and whether it is new.

    Raises InvalidRequest, NotFound, and Conflict `export_exists` where there is one with other options.
    """
    check_block(session, model.project_id, [format_], student, param)
    check_adaptation([format_], phases_of(model), f"{param}format")
    options: dict[str, Any] = {}
    if student is not None:
        options["student"] = _resolve(session, model, student, f"{param}student")
    before = repository.find_format(session, model, format_)
    if before is not None:
        return _same(before, options), False
    current = session.scalars(select(now())).one()
    export = Export(
        id=new_id("export"),
        project_id=model.project_id,
        model_id=model.id,
        format=format_,
        options=options,
        status="queued",
        fence=0,
        attempts=0,
        hinted_at=current,
        created_at=current,
    )
    try:
        with session.begin_nested():
            if student is not None:
                files.hold(session, student.training_file, export.id)
            session.add(export)
            session.flush()
    except IntegrityError:
        before = repository.find_format(session, model, format_)
        if before is None:
            raise
        return _same(before, options), False
    return export, True


def request_all(session: Session, model: Model, block: Mapping[str, Any]) -> None:
    """Asks for all that a job's `export` names, once it has made this model. What cannot be made of it is left out: the
    job has succeeded whatever becomes of its exports."""
    asked = ExportBlock.model_validate(block)
    for format_ in asked.formats:
        try:
            request(session, model, format_, asked.student if format_ == "student" else None)
        except (InvalidRequest, NotFound, Conflict) as error:
            _refused(session, model, format_, error)


def get(session: Session, model: Model, export_id: str) -> Export:
    """The model's export of that id; NotFound without one."""
    export = repository.find(session, model, export_id)
    if export is None:
        raise NotFound("export")
    return export


def get_finished(session: Session, model: Model, export_id: str) -> Export:
    """The same, with files to be downloaded; Conflict `export_not_finished` before."""
    export = get(session, model, export_id)
    if export.status != "succeeded":
        raise Conflict("export_not_finished", "This export has no files: it has not succeeded.")
    return export


def delete(session: Session, model: Model, export_id: str) -> Export:
    """Deletes an export; a worker that makes it notices at its next heartbeat. Its bytes go after the commit."""
    export = get(session, model, export_id)
    export.deleted_at = session.scalars(select(now())).one()
    session.flush()
    files.release(session, export.id)
    models.note_export(session, model.id, export.format, None)
    return export


def of_jobs(session: Session, job_ids: Sequence[str]) -> dict[str, list[Export]]:
    """The exports of the jobs' models, by job."""
    return repository.of_jobs(session, job_ids)


def prefix(model_prefix: str, export_id: str) -> str:
    """Above all that the attempts at an export store: below the model's own bytes, and gone with them."""
    return f"{model_prefix}/exports/{export_id}"


def _same(before: Export, options: Mapping[str, Any]) -> Export:
    if before.options != options:
        raise Conflict("export_exists", "The model has an export of this format, made otherwise; delete it first.")
    return before


def _refused(session: Session, model: Model, format_: str, error: InvalidRequest | NotFound | Conflict) -> None:
    """An export that failed before it began, so that who asked for it is told."""
    if repository.find_format(session, model, format_) is None:
        current = session.scalars(select(now())).one()
        session.add(
            Export(
                id=new_id("export"),
                project_id=model.project_id,
                model_id=model.id,
                format=format_,
                options={},
                status="failed",
                fence=0,
                attempts=0,
                error={"code": error.code, "message": error.message},
                created_at=current,
                finished_at=current,
            )
        )
        session.flush()


def _public_file(session: Session, project_id: str, file_id: str, param: str) -> File:
    try:
        file = files.get(session, project_id, file_id)
    except NotFound as error:
        raise NotFound("file", param=param) from error
    if not file.public:
        raise InvalidRequest(
            "file_not_public",
            "A student learns from a file that was declared public: private rows would cost privacy again.",
            param=param,
        )
    return file


def _resolve(session: Session, model: Model, student: StudentBlock, param: str) -> dict[str, Any]:
    """The block with the columns that the model's task reads, found in the file, and what stands before its sources."""
    file = _public_file(session, model.project_id, student.training_file, f"{param}.training_file")
    if file.status != "processed":
        raise Conflict(
            "file_not_processed", "The file is not read yet, or could not be.", param=f"{param}.training_file"
        )
    present = {column["name"] for column in file.columns or ()}
    own = _fact(model, report_format.COLUMN_NAMES)
    options = _fact(model, report_format.OPTIONS)
    task = options.get("task", {}) if isinstance(options, Mapping) else {}
    told = {name: task[name] for name in ("source_prefix", "languages_of") if task.get(name)}
    family = FAMILIES.get(str(told.get("languages_of")))
    if family is not None and family.language_tokens:
        raise InvalidRequest(
            "format_not_supported", "No student is taught in several languages that tokens tell apart.", param=param
        )
    roles, needed = _TEXT_ROLES, _TEXT_ROLES[:1]
    if isinstance(own, Mapping) and "source" in own:
        roles = needed = (*_WRITTEN_ROLES, *(_LANGUAGE_ROLES if "languages_of" in told else ()))
    columns = {}
    for role in roles:
        asked = (student.columns or {}).get(role)
        if asked is not None and asked not in present:
            raise InvalidRequest("column_not_found", "The public file has no such column.", param=f"{param}.columns")
        trained = own.get(role) if isinstance(own, Mapping) else None
        named = [asked] if asked else [trained, *_usual_names(role, present)]
        found = next((name for name in named if name in present), None)
        if found is not None and (role in needed or trained or asked):
            columns[role] = found
    for role in needed:
        if role not in columns:
            raise InvalidRequest(
                "column_not_found",
                f"Which column of the public file holds the {role}? Say it in `columns`.",
                param=f"{param}.columns",
            )
    if "languages_of" in told:
        _require_known_languages(model, file, str(told["languages_of"]), columns, f"{param}.training_file")
    return {**student.model_dump(exclude={"columns"}), "columns": columns, **told}


def _require_known_languages(model: Model, file: File, family: str, columns: Mapping[str, str], param: str) -> None:
    """InvalidRequest `invalid_languages` where a row says a language that none of the model's own rows could."""
    codes = () if model.base_facts is None else model.base_facts["languages"]
    for role in _LANGUAGE_ROLES:
        found = next(column.get("classes") for column in file.columns or () if column["name"] == columns[role])
        if not languages.all_have_words(family, codes, role, found):
            raise InvalidRequest(
                "invalid_languages", f"A row's {role} is not known. {languages.known(family)}", param=param
            )


def _usual_names(role: str, present: set[str]) -> list[str]:
    """Columns of the file by which the catalog's tasks infer that role."""
    usual = [name for task in TASKS.values() for column in task.columns if column.role == role for name in column.names]
    by_lower = {name.lower(): name for name in sorted(present)}
    return [by_lower[name] for name in usual if name in by_lower]


def _fact(model: Model, what: str) -> Any:
    facts = model.privacy_report.get("treated_as_public", [])
    return next((fact["value"] for fact in facts if fact.get("what") == what), {})
