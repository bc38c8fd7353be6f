"""Exports on the wire: the block of a job, the body of a create, the object."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.catalog.exports import EXPORT_FORMATS, POST_PROCESSING
from app.exports.tables import Export

FormatName = Literal["safetensors", "adapter", "fp16", "bf16", "onnx", "onnx_int8", "student"]

ColumnName = Annotated[str, Field(min_length=1, max_length=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StudentBlock(_Strict):
    """What a student is distilled on: the texts of a file that was declared public. columns: role → column, where the
    file has others than the job's. num_layers: of the student; half of the model's without it."""

    training_file: str = Field(min_length=1, max_length=64)
    columns: dict[ColumnName, ColumnName] | None = Field(None, max_length=16)
    num_layers: int | None = Field(None, ge=1, le=1000)
    n_epochs: int = Field(3, ge=1, le=50)


class ExportBlock(_Strict):
    """`export` of a job: what is made once it has succeeded."""

    formats: list[FormatName] = Field(min_length=1, max_length=len(EXPORT_FORMATS))
    student: StudentBlock | None = None


class CreateExport(_Strict):
    """POST /models/{id}/exports."""

    format: FormatName
    student: StudentBlock | None = None


class ExportFile(BaseModel):
    """A file of an export; its SHA-256 is its ETag, too."""

    object: Literal["model.export.file"] = "model.export.file"
    path: str
    bytes: int
    sha256: str


class ExportFileList(BaseModel):
    """Everything in an export, and the archives that it can be downloaded as."""

    object: Literal["list"] = "list"
    data: list[ExportFile]
    has_more: Literal[False] = False
    archives: dict[str, Any]


class ExportPrivacy(BaseModel):
    """What an export costs: nothing, and why."""

    epsilon: Literal[0] = 0
    statement: str = POST_PROCESSING


class ExportOut(BaseModel):
    """A model in one form."""

    id: str
    object: Literal["model.export"] = "model.export"
    model: str
    format: str
    status: Literal["queued", "running", "succeeded", "failed"]
    runtime: str
    created_at: int
    started_at: int | None
    finished_at: int | None
    student: dict[str, Any] | None
    metrics: dict[str, Any] | None
    error: dict[str, Any] | None
    privacy: ExportPrivacy = Field(default_factory=ExportPrivacy)


class ExportList(BaseModel):
    """The exports of a model, newest first; at most one of a form."""

    object: Literal["list"] = "list"
    data: list[ExportOut]
    has_more: Literal[False] = False


class ExportDeleted(BaseModel):
    """The answer to a delete."""

    id: str
    object: Literal["model.export"] = "model.export"
    deleted: Literal[True] = True


def render(export: Export) -> ExportOut:
    """An export as it stands."""
    status: Any = export.status
    return ExportOut(
        id=export.id,
        model=export.model_id,
        format=export.format,
        status=status,
        runtime=EXPORT_FORMATS[export.format].runtime,
        created_at=int(export.created_at),
        started_at=_seconds(export.started_at),
        finished_at=_seconds(export.finished_at),
        student=export.options.get("student"),
        metrics=export.metrics,
        error=export.error,
    )


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
