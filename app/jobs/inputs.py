"""What a job is planned from: its base, its files and their budgets, as they were when a request was read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.budgets import service as budgets
from app.catalog.bases import BaseModel
from app.catalog.tasks import TASKS
from app.db.session import Database
from app.errors import Conflict, InvalidRequest, NotFound
from app.exports import service as exports
from app.files import service as files
from app.files.tables import File
from app.jobs.facts import BudgetFacts, FileFacts
from app.jobs.schemas import CreateJob
from app.models import service as models
from app.settings import Settings


class Stale(Conflict):
    """What the plan was made of has changed; told only when it happens again and again."""

    def __init__(self) -> None:
        super().__init__("file_changed", "A file changed while the job was planned.", param="training_file")


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that planning reads. training is None while a file is not processed yet: then only `base` is known."""

    base: BaseModel
    training: FileFacts | None
    validation: FileFacts | None

    @property
    def budgets(self) -> dict[str, BudgetFacts]:
        """Those that the plan touches."""
        files = (self.training, self.validation)
        return {file.budget.id: file.budget for file in files if file is not None and file.budget is not None}


def read(database: Database, settings: Settings, project_id: str, body: CreateJob) -> Inputs:
    """From the files' rows and their budgets, in one view; the base before it, since its weights may have to be hashed.

    Raises InvalidRequest, NotFound, and Conflict where a budget is locked.
    """
    base = models.find_base_for(database, settings, project_id, body.model)
    if base is None:
        raise NotFound("model", param="model", hint="GET /v1/base_models lists what jobs can start from.")
    with database.reading() as session:
        return _read_files(session, project_id, body, base)


def _read_files(session: Session, project_id: str, body: CreateJob, base: BaseModel) -> Inputs:
    training = _file(session, project_id, body.training_file, "training_file")
    validation = None
    if body.validation_file is not None:
        if body.validation_file == body.training_file:
            raise InvalidRequest(
                "invalid_request", "The validation file is the training file.", param="validation_file"
            )
        validation = _file(session, project_id, body.validation_file, "validation_file")
        if validation is None:
            training = None
    if body.export is not None:
        exports.check_block(session, project_id, body.export.formats, body.export.student, "export.")
    return Inputs(base, training, validation)


def _file(session: Session, project_id: str, file_id: str, param: str) -> FileFacts | None:
    """The file's facts; None while it is being read."""
    file = _find(session, project_id, file_id, param)
    if file.status == "error":
        reason = file.error or {}
        raise InvalidRequest(
            "file_failed",
            f"The file could not be read: {reason.get('message', 'it was refused.')}",
            param=param,
            file_error=reason.get("code"),
        )
    if file.status != "processed":
        return None
    assert file.num_rows is not None
    assert file.rows_digest is not None
    budget = None
    if not file.public:
        assert file.budget_id is not None
        row = budgets.get(session, project_id, file.budget_id)
        budgets.require_unlocked(row)
        budget = BudgetFacts(
            id=row.id,
            accounting=budgets.accounting_of(row),
            usage=budgets.usage(session, row.id),
            open=row.status == "open",
            unit_column=row.privacy_unit["column"],
            policy=row.policy,
        )
    return FileFacts(
        id=file.id,
        param=param,
        num_rows=file.num_rows,
        rows_digest=file.rows_digest,
        columns=tuple(file.columns or ()),
        budget=budget,
        unit_column=file.unit_column,
        num_units=file.num_units,
        label_lists=tuple(file.label_lists or ()),
    )


def _find(session: Session, project_id: str, file_id: str, param: str) -> File:
    try:
        return files.get(session, project_id, file_id)
    except NotFound as error:
        raise NotFound("file", param=param, hint="GET /v1/files lists those of this project.") from error


def note_labels(database: Database, project_id: str, body: CreateJob, inputs: Inputs) -> None:
    """Before a list of classes is compared with private rows for a key that may not see them: whether it holds all of
    their classes is told, but not of as many lists as one likes. Raises InvalidRequest (too_many_label_lists)."""
    if body.task is None or body.task.labels is None:
        return
    columns = sorted(body.task.columns.items())
    compared = [column for role, column in columns if role in {task.class_role for task in TASKS.values()}]
    # Whatever makes the same list another question: of which column it is, and of its cells or of what they list.
    asked = [compared, body.task.type, body.task.multi_label, sorted(set(body.task.labels))]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    for file in (inputs.training, inputs.validation):
        if file is not None and not file.public and digest not in file.label_lists:
            with database.writing() as session:
                files.note_labels(session, project_id, file.id, digest)


def require_unchanged(session: Session, project_id: str, inputs: Inputs) -> None:
    """Raises Stale where a file is not what was planned with, NotFound where it is gone."""
    for known in (inputs.training, inputs.validation):
        if known is not None:
            file = _find(session, project_id, known.id, known.param)
            budget_id = None if known.budget is None else known.budget.id
            if (file.status, file.rows_digest, file.budget_id) != ("processed", known.rows_digest, budget_id):
                raise Stale
