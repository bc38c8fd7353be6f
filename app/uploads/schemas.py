"""Uploads on the wire."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from app.files.schemas import FileOut, UnitColumn, unit_in
from app.files.schemas import render as render_file
from app.files.tables import File
from app.uploads.tables import Part, Upload

#: Of one part; what the wire's client sends at once.
MAX_PART_BYTES = 64 * 2**20
MAX_PARTS = 10_000


def _unit(value: Any) -> Any:
    """A privacy unit may be written as in the form of POST /v1/files, or as an object."""
    return unit_in(value) if isinstance(value, str) else value


class ExpiresAfter(BaseModel):
    """When the file that the upload becomes is deleted."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class CreateUpload(BaseModel):
    """The wire's fields, and after them those that POST /v1/files takes as well."""

    model_config = ConfigDict(extra="forbid")

    bytes: Annotated[int, Field(ge=1, le=2**53)]
    filename: Annotated[str, Field(min_length=1, max_length=1024)]
    mime_type: Annotated[str, Field(max_length=255)]
    purpose: Annotated[str, Field(max_length=32)]
    expires_after: ExpiresAfter | None = None
    privacy_budget: Annotated[str, Field(max_length=64)] | None = None
    privacy_unit: Annotated[UnitColumn | None, BeforeValidator(_unit)] = None
    public: bool = False


class CompleteUpload(BaseModel):
    """part_ids: in the order of their bytes. md5: of all of them, in hexadecimal."""

    model_config = ConfigDict(extra="forbid")

    part_ids: Annotated[list[Annotated[str, Field(max_length=64)]], Field(min_length=1, max_length=MAX_PARTS)]
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$")] | None = None


class UploadOut(BaseModel):
    """The wire's `upload`. file: once it is completed."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileOut | None


class UploadList(BaseModel):
    """A page of uploads."""

    object: Literal["list"] = "list"
    data: list[UploadOut]
    has_more: bool


class PartOut(BaseModel):
    """The wire's `upload.part`, and its size."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str
    bytes: int


class PartList(BaseModel):
    """A page of parts."""

    object: Literal["list"] = "list"
    data: list[PartOut]
    has_more: bool


def render(upload: Upload, file: File | None) -> UploadOut:
    """The upload as the wire has it; file: the one that it became, unless it was deleted."""
    return UploadOut(
        id=upload.id,
        bytes=upload.bytes,
        created_at=int(upload.created_at),
        expires_at=int(upload.expires_at),
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status,
        file=None if file is None else render_file(file),
    )


def render_part(part: Part) -> PartOut:
    """The part as the wire has it."""
    return PartOut(id=part.id, created_at=int(part.created_at), upload_id=part.upload_id, bytes=part.bytes)
