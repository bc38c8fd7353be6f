"""Stored files as answers: one of them, or all as one archive. Of a model's bundle and of its exports alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import Query, Request
from fastapi.responses import Response

from app.errors import NotFound
from app.http.downloads import Download, respond
from app.models import archives
from app.storage import Storage

ArchiveName = Annotated[Literal["tar", "zip"], Query(alias="format", description="Of the archive.")]

_MEDIA_TYPES = {".json": "application/json", ".md": "text/markdown", ".txt": "text/plain", ".py": "text/plain"}


def find_file(files: Sequence[Mapping[str, Any]], path: str) -> Mapping[str, Any]:
    """The file of exactly that path; NotFound."""
    for file in files:
        if file["path"] == path:
            return file
    raise NotFound("file")


def send_file(
    request: Request, storage: Storage, prefix: str, files: Sequence[Mapping[str, Any]], path: str
) -> Response:
    """One file of those stored under `prefix`."""
    file = find_file(files, path)
    key = f"{prefix}/{file['path']}"
    suffix = file["path"][file["path"].rfind(".") :]
    return respond(
        request,
        Download(
            filename=file["path"],
            media_type=_MEDIA_TYPES.get(suffix, "application/octet-stream"),
            size=file["bytes"],
            sha256=file["sha256"],
            read=lambda start, end: storage.stream(key, start, end),
        ),
    )


def send_archive(
    request: Request,
    storage: Storage,
    prefix: str,
    files: Sequence[Mapping[str, Any]],
    described: Mapping[str, Any],
    name: str,
    format_: str,
) -> Response:
    """All of them as one archive. described: {format: {bytes, sha256}}."""

    def read_file(path: str, start: int, end: int) -> Iterator[bytes]:
        return storage.stream(f"{prefix}/{path}", start, end)

    return respond(
        request,
        Download(
            filename=f"{name}.{format_}",
            media_type=archives.FORMATS[format_].media_type,
            size=described[format_]["bytes"],
            sha256=described[format_]["sha256"],
            read=lambda start, end: archives.read(format_, files, start, end, read_file),
        ),
    )
