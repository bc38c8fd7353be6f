"""Receives one multipart upload: the file goes to the storage as it arrives, hashed on the way, in bounded memory."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog
from fastapi import Request
from starlette.requests import ClientDisconnect
from streaming_form_data import StreamingFormDataParser
from streaming_form_data.parser import ParseFailedException, UnexpectedPartException
from streaming_form_data.targets import BaseTarget

from app.errors import InvalidRequest, PayloadTooLarge, ServiceUnavailable
from app.files.limits import MAX_RECEIVING_SECONDS
from app.storage import Storage

log = structlog.get_logger(__name__)

#: Bytes of one form field beside the file.
_MAX_FIELD = 4096
#: Room for boundaries, part headers and fields around a file of the largest size.
_FRAMING = 2**16
#: A refused client that is still sending hears of it only once it has sent: so much is read and dropped.
_DRAINED = 2**28


def _nothing(_fields: Mapping[str, str]) -> None:
    """No fields, no questions."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a form may hold. file: the part with the bytes, and what they are called in errors; fields: the others.

    check: raises for fields that will be refused; asked before the file is stored where the fields precede it, as
    they do from the wire's client, and in any case at the end.
    """

    file: str = "file"
    noun: str = "file"
    fields: frozenset[str] = frozenset()
    check: Callable[[Mapping[str, str]], object] = _nothing


@dataclass(frozen=True, slots=True)
class Received:
    """filename: for people to read; it never becomes a path."""

    fields: Mapping[str, str]
    filename: str
    bytes: int
    sha256: str


class _Field(BaseTarget):  # type: ignore[misc]
    """A part of text."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""
        self.parts = 0

    def on_start(self) -> None:
        self.parts += 1

    def on_data_received(self, chunk: bytes) -> None:
        self.data += chunk[: _MAX_FIELD + 1 - len(self.data)]


class _File(BaseTarget):  # type: ignore[misc]
    """The file's part: hands on what has arrived since the last look."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes] = []
        self.parts = 0
        self.finished = False

    def on_start(self) -> None:
        self.parts += 1

    def on_data_received(self, chunk: bytes) -> None:
        self.pieces.append(bytes(chunk))

    def on_finish(self) -> None:
        self.finished = True

    def take(self) -> bytes:
        """What came since; empty where nothing did."""
        data, self.pieces = b"".join(self.pieces), []
        return data


async def receive(request: Request, storage: Storage, key: str, form: Form, max_bytes: int) -> Received:
    """The form, with its file stored under `key`. Where it raises, nothing is stored.

    Raises PayloadTooLarge (file_too_large, part_too_large), ServiceUnavailable (storage_unavailable) and InvalidRequest
    (invalid_multipart, missing_file, unknown_field, upload_interrupted, upload_too_slow).
    """
    try:
        if int(request.headers.get("content-length", 0)) > max_bytes + _FRAMING:
            raise _too_large(form, max_bytes)
        async with asyncio.timeout(MAX_RECEIVING_SECONDS) as limit:
            return await _receive(request, storage, key, form, max_bytes)
    except ClientDisconnect:
        raise InvalidRequest(
            "upload_interrupted", "The connection ended before the file did.", param=form.file
        ) from None
    except OSError as error:  # a store that does not answer in time raises TimeoutError, too
        if isinstance(error, TimeoutError) and limit.expired():
            raise InvalidRequest(
                "upload_too_slow", "The file did not arrive in time; send it in parts.", param=form.file
            ) from None
        log.warning("upload_not_stored", error=type(error).__name__)
        await drain(request)
        raise ServiceUnavailable("storage_unavailable", "The file could not be stored; try again.") from error
    except Exception:
        await drain(request)
        raise


async def _receive(request: Request, storage: Storage, key: str, form: Form, max_bytes: int) -> Received:
    file = _File()
    targets = {name: _Field() for name in form.fields}
    try:
        parser = StreamingFormDataParser(request.headers, strict=True)
    except ParseFailedException:
        raise _invalid() from None
    parser.register(form.file, file)
    for name, target in targets.items():
        parser.register(name, target)

    digest, size, checked = hashlib.sha256(), 0, False
    async with storage.put_stream(key) as writer:
        async for chunk in request.stream():
            try:
                parser.data_received(chunk)
            except UnexpectedPartException:
                others = f" and {', '.join(sorted(form.fields))}" if form.fields else " alone"
                raise InvalidRequest("unknown_field", f"The form takes `{form.file}`{others}.") from None
            except (ParseFailedException, ValueError):
                raise _invalid() from None
            if file.parts and not checked and "purpose" in (given := _values(targets)):
                form.check(given)
                checked = True
            if data := file.take():
                size += len(data)
                if size > max_bytes:
                    raise _too_large(form, max_bytes)
                digest.update(data)
                await writer.write(data)
        if file.parts == 0:
            raise InvalidRequest("missing_file", f"The form needs a part named `{form.file}`.", param=form.file)
        if not file.finished or file.parts > 1:
            raise _invalid()
        fields = _values(targets)
        form.check(fields)
    return Received(fields, display_name(file.multipart_filename), size, digest.hexdigest())


def _values(targets: Mapping[str, _Field]) -> dict[str, str]:
    fields = {}
    for name, target in targets.items():
        if target.parts > 1:
            raise _invalid()
        if target.parts:
            try:
                fields[name] = target.data.decode()
            except UnicodeDecodeError:
                raise _invalid() from None
            if len(target.data) > _MAX_FIELD:
                raise InvalidRequest("invalid_request", f"`{name}` is too long.", param=name)
    return fields


def display_name(filename: str | None) -> str:
    """The last part of what may be a path on the client, without control characters."""
    name = (filename or "").replace("%22", '"').replace("\\", "/").rpartition("/")[2]
    return "".join(character for character in name if character.isprintable())[:255] or "upload"


def _too_large(form: Form, max_bytes: int) -> PayloadTooLarge:
    message = f"This server takes {form.noun}s of up to {max_bytes} bytes here."
    return PayloadTooLarge(f"{form.noun}_too_large", message, param=form.file, max_bytes=max_bytes)


def _invalid() -> InvalidRequest:
    return InvalidRequest("invalid_multipart", "The body is not a complete multipart/form-data form.")


async def drain(request: Request) -> None:
    """Reads and drops what a refused client is still sending, so that it hears the answer."""
    left = _DRAINED
    try:
        async for chunk in request.stream():
            left -= len(chunk)
            if left < 0:
                return
    except (ClientDisconnect, RuntimeError):
        return
