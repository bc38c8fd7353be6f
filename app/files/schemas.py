"""Files on the wire, and the form that uploads one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.files.tables import File


class UploadForm(BaseModel):
    """The form's fields beside the file itself, as text. A field that is none of these is refused: a misspelt one
    would silently protect less than was meant."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    purpose: str
    privacy_budget: Annotated[str, Field(max_length=64)] | None = None
    privacy_unit: str | None = None
    public: bool = False
    expires_after_anchor: Annotated[Literal["created_at"] | None, Field(alias="expires_after[anchor]")] = None
    expires_after_seconds: Annotated[int | None, Field(alias="expires_after[seconds]", ge=3600, le=2_592_000)] = None


class FileError(BaseModel):
    """What is wrong with a dataset, and where; never what was read."""

    code: str
    message: str
    line: int | None = None
    column: int | None = None
    row: int | None = None


class FileColumn(BaseModel):
    """A column of a processed dataset."""

    name: str
    type: str


class FileOut(BaseModel):
    """The wire's `file`, and ours after `status_details`."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    error: FileError | None
    public: bool
    privacy_budget: str | None
    privacy_unit: Literal["record"] | None
    num_rows: int | None
    columns: list[FileColumn] | None


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileOut]
    has_more: bool


class FileDeleted(BaseModel):
    """The wire's answer to a delete."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def render(file: File) -> FileOut:
    """The file as the wire has it: of the profile only names and types, which hold no counts and no classes."""
    error: dict[str, Any] | None = file.error
    return FileOut(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        expires_at=None if file.expires_at is None else int(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
        status=file.status,
        status_details=error["message"] if error else None,
        error=FileError(**error) if error else None,
        public=file.public,
        privacy_budget=file.budget_id,
        privacy_unit=None if file.public else "record",
        num_rows=file.num_rows,
        columns=[FileColumn(name=column["name"], type=column["type"]) for column in file.columns]
        if file.columns
        else None,
    )
