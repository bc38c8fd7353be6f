"""Errors in the wire's envelope, one shape for all: {"error": {"message", "type", "param", "code", …}}.

Nothing that the client sent comes back but the names of fields: a private row in a request stays out of its answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from app.errors import ApiError, InvalidRequest, ServiceUnavailable

log = structlog.get_logger(__name__)

#: The client retries these; every other 4xx, 409 among them, is told not to be.
_WORTH_A_RETRY = frozenset({408, 429})

#: A part of a field's path that may be shown: a name, never a value used as a key.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")

#: Pydantic's kinds of error, in words that hold limits and choices of ours, never the input.
_REASONS = {
    "missing": "is required",
    "extra_forbidden": "is not a field of this request",
    "json_invalid": "is not valid JSON",
    "json_type": "is not valid JSON",
    "string_type": "must be a string",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "none_required": "must be null",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "union_tag_invalid": "has a type that is none of {expected_tags}",
    "union_tag_not_found": "needs a type",
}

_STATUS_MESSAGES = {
    400: ("invalid_request", "The request could not be read."),
    404: ("route_not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This address does not answer this method."),
    413: ("payload_too_large", "The request is larger than this server takes."),
}


class Problem(BaseModel):
    """What went wrong; some errors carry further keys."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    param: str | None
    code: str


class Envelope(BaseModel):
    """Every answer that is not a success."""

    error: Problem


#: For routers: the documentation names this shape in place of FastAPI's own, which quotes the input.
RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"model": Envelope}, "5XX": {"model": Envelope}}


_BINARY = {"type": "string", "format": "binary"}
_MEDIA = {
    "application/json": {"type": "object"},
    "*/*": _BINARY,
    "application/x-tar": _BINARY,
    "application/zip": _BINARY,
}


def answered(model: type[BaseModel] | None, *media: str) -> dict[str, Any]:
    """For a route whose answer is made elsewhere: the documentation names its shape, or the media types of its bytes.

    Nothing is checked or filtered by it on the way out: tests hold answers against it.
    """
    told: dict[str, Any] = {"description": "Success"}
    if model is not None:
        told["model"] = model
    if media:
        told["content"] = {name: {"schema": _MEDIA.get(name, {"type": "string"})} for name in media}
    return {"response_model": None, "responses": {200: told}}


def install(app: FastAPI) -> None:
    """Registers the handlers."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(DataError, _data_error)
    app.add_exception_handler(OperationalError, _database_error)
    app.add_exception_handler(PoolTimeout, _database_error)


def envelope(error: ApiError) -> JSONResponse:
    """The answer that tells of this error."""
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    # Ours win: an extra key may not hide the wire's four.
    return _response(error.status, {**error.extra, **body})


def unexpected() -> JSONResponse:
    """The answer to a mistake of ours: it tells nothing, the log tells where."""
    return _response(
        500,
        {
            "message": "The server failed to answer. The log has the details under this request id.",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        },
    )


def _response(status: int, error: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> JSONResponse:
    extra = dict(headers or {})
    if 400 <= status < 500 and status not in _WORTH_A_RETRY:
        extra["x-should-retry"] = "false"
    if status == 401:
        extra["www-authenticate"] = "Bearer"
    if status == 503:
        extra["retry-after"] = "1"
    return JSONResponse({"error": error}, status_code=status, headers=extra)


def _api_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return envelope(error)


def _data_error(_request: Request, error: Exception) -> JSONResponse:
    """PostgreSQL keeps no U+0000, in ids no more than in texts. The error itself would quote what was sent."""
    log.warning("value_not_stored", error=type(error).__name__)
    return envelope(InvalidRequest("invalid_request", "A value of the request is none that can be stored."))


def _validation_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = [{"param": _path(place), "message": reason} for place, reason in _told(error.errors())]
    first = problems[0]
    subject = f"`{first['param']}`" if first["param"] else "The request body"
    return envelope(
        InvalidRequest(
            "invalid_request",
            f"{subject} {first['message']}.",
            param=first["param"],
            **({"errors": problems} if len(problems) > 1 else {}),
        )
    )


def _http_exception(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code, message = _STATUS_MESSAGES.get(error.status_code, ("http_error", "The request cannot be answered."))
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return _response(error.status_code, body, error.headers)


def _database_error(_request: Request, error: Exception) -> JSONResponse:
    log.warning("database_unavailable", error=type(error).__name__)
    return envelope(ServiceUnavailable("database_unavailable", "The database does not answer in time; try again."))


def _told(errors: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Place and reason of each. Of a field that takes a word of ours or something else, pydantic tells of both, by
    names of types in the path: that is one mistake, of the other kind unless there is none."""
    # By the kind of error, too: a key that the client made up may look like the name of a type.
    of_words = [e for e in errors if e["type"] == "literal_error" and str(e["loc"][-1]).startswith("literal[")]
    words = {e["loc"][:-1]: e for e in of_words}
    others = {place for place in words for e in errors if e is not words[place] and e["loc"][: len(place)] == place}
    for each in errors:
        place, reason = each["loc"], _reason(each)
        either = next((start for start in words if place[: len(start)] == start), None)
        if either is not None and each is words[either]:
            if either not in others:
                yield either, reason
        elif either is not None:
            inner = place[len(either) + 1 :]
            yield either + inner, reason if inner else f"{reason}, or {words[either]['ctx']['expected']}"
        elif place[-1] == "[key]":
            yield place[:-2], f"has a key that {reason}"
        else:
            yield place, reason


def _path(loc: tuple[int | str, ...]) -> str | None:
    """The dotted path of a field within the body, query or form; None for the whole body."""
    if loc[1:] and isinstance(loc[1], int) and loc[0] == "body":
        return None  # a position in text that is no JSON
    parts = [str(part) if isinstance(part, int) else part if _NAME.fullmatch(part) else "*" for part in loc[1:]]
    return ".".join(parts) or None


def _reason(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        # A validator of ours: its text is fixed by the same rule as every other message.
        return str(context["error"]).rstrip(".")
    return _REASONS.get(kind, "is not valid").format(**context)
