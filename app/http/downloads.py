"""Bytes that are downloaded: ETag, one range, conditions and HEAD, as RFC 9110 has them.

The ETag is the SHA-256 of the whole body, in hexadecimal: strong, and a check of what arrived. Several ranges at once
are answered with the whole body, as the RFC allows: they are what floods of overlapping ranges are made of.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from app.errors import ApiError
from app.http.problems import answered, envelope

#: What the documentation says of routes that answer so.
A_FILE: dict[str, Any] = {"response_class": Response, **answered(None, "*/*")}
AN_ARCHIVE: dict[str, Any] = {"response_class": Response, **answered(None, "application/x-tar", "application/zip")}

_RANGE = re.compile(r"bytes=\s*(\d{0,19})-(\d{0,19})\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Download:
    """sha256: of the whole body. read: the bytes from start (included) to end (excluded)."""

    filename: str
    media_type: str
    size: int
    sha256: str
    read: Callable[[int, int], Iterator[bytes]]


class RangeNotSatisfiable(ApiError):
    """The range begins behind the end."""

    status = 416


class PreconditionFailed(ApiError):
    """The body is another than the client means."""

    status = 412


def respond(request: Request, download: Download) -> Response:
    """The answer to a GET or HEAD: 200, 206, 304, 412 or 416."""
    etag = f'"{download.sha256}"'
    headers = {
        "etag": etag,
        "accept-ranges": "bytes",
        "cache-control": "private, no-cache",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(download.filename, safe='')}",
        "repr-digest": f"sha-256=:{base64.b64encode(bytes.fromhex(download.sha256)).decode()}:",
        "x-content-type-options": "nosniff",
    }
    given = request.headers
    if (wanted := given.get("if-match")) is not None and not _matches(wanted, etag):
        return envelope(PreconditionFailed("precondition_failed", "The body is not the one that `If-Match` names."))
    if (known := given.get("if-none-match")) is not None and _matches(known, etag):
        return Response(status_code=304, headers={name: headers[name] for name in ("etag", "cache-control")})

    start, end, status = 0, download.size, 200
    # A validator that is another ETag, or a date (none is ever sent), means: the whole body. HEAD knows no ranges.
    if request.method == "GET" and given.get("if-range", etag) == etag:
        try:
            wanted_range = parse_range(given.get("range"), download.size)
        except RangeNotSatisfiable as error:
            refused = envelope(error)
            refused.headers["content-range"] = f"bytes */{download.size}"
            return refused
        if wanted_range is not None:
            (start, end), status = wanted_range, 206
            headers["content-range"] = f"bytes {start}-{end - 1}/{download.size}"
    headers["content-length"] = str(end - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=download.media_type)
    return StreamingResponse(
        download.read(start, end), status_code=status, headers=headers, media_type=download.media_type
    )


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Start (included) and end (excluded); None for the whole body: without a header, or with one that is no single
    range of bytes. Raises RangeNotSatisfiable."""
    match = _RANGE.fullmatch(header) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first == "":
        length = min(int(last), size)
        start, end = size - length, size
    else:
        start, end = int(first), size if last == "" else min(int(last) + 1, size)
        if last and int(last) < start:
            return None
    if start >= size or start >= end:
        raise RangeNotSatisfiable("range_not_satisfiable", "The range begins behind the end.", param="range")
    return start, end


def _matches(header: str, etag: str) -> bool:
    return header.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in header.split(","))
