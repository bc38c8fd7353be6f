"""Errors in one shape, whatever goes wrong, and never with what was sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from fastapi import APIRouter, FastAPI, Form, Query
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict, Field, field_validator
from sqlalchemy.exc import OperationalError

from app.errors import ApiError, BudgetExceeded, Conflict, NotFound, PermissionDenied, ServiceUnavailable, Unauthorized
from app.http.deps import Reader, Writing
from app.http.middleware import MAX_BODY

#: Stands for a private row: whatever is done with it, it may not come back.
ROW = "Zymurgy-4711"


class Head(BaseModel):
    type: Literal["head"]
    n: int = Field(1, ge=1, le=12)


class Lora(BaseModel):
    type: Literal["lora"]
    rank: int


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=8)
    epochs: int | Literal["auto"] = "auto"
    epsilon: float = Field(1.0, gt=0, allow_inf_nan=False)
    adaptation: Annotated[Head | Lora, Field(discriminator="type")] | None = None
    metadata: dict[str, str] = {}
    suffix: Annotated[str, Field(pattern="^[a-z]+$")] = "a"
    columns: list[int] = []

    @field_validator("metadata")
    @classmethod
    def _few(cls, value: dict[str, str]) -> dict[str, str]:
        if len(value) > 2:
            raise ValueError("must have at most 2 pairs.")
        return value


router = APIRouter()
ERRORS: dict[str, ApiError] = {
    "budget": BudgetExceeded("budget_exceeded", "It does not fit.", param="privacy", epsilon_remaining=1.5),
    "conflict": Conflict("file_in_use", "A job needs it."),
    "missing": NotFound("file"),
    "denied": PermissionDenied("insufficient_scope", "No."),
    "unknown": Unauthorized("invalid_api_key", "No."),
    "later": ServiceUnavailable("later", "Later."),
}


@router.post("/probe/body")
def body(body: Body) -> str:
    return "ok"


@router.get("/probe/query")
def query(limit: Annotated[int, Query(ge=1)]) -> str:
    return "ok"


@router.post("/probe/form")
def form(expires: Annotated[int, Form()]) -> str:
    return "ok"


@router.get("/probe/error/{name}")
def error(name: str) -> str:
    raise ERRORS[name]


@router.get("/probe/bug")
def bug() -> str:
    raise RuntimeError(ROW)


@router.get("/probe/bug-in-transaction")
def bug_in_transaction(session: Writing, caller: Reader) -> str:
    raise KeyError(ROW)


@router.get("/probe/database")
def database() -> str:
    raise OperationalError(ROW, {}, Exception(ROW))


@pytest.fixture
def client(app: FastAPI, client: TestClient) -> TestClient:
    app.include_router(router)
    return client


def _error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert response.headers["x-request-id"].startswith("req-")
    assert ROW not in response.text
    assert ROW not in str(response.headers)
    return error


def test_a_key_that_looks_like_a_name_of_pydantics_is_a_key(client: TestClient) -> None:
    response = client.post("/probe/body", json={"model": "m", "literal['a']": 1, "more": 2})
    problems = _error(response, 400)["errors"]
    assert [(each["param"], each["message"]) for each in problems] == [
        ("*", "is not a field of this request"),
        ("more", "is not a field of this request"),
    ]


@pytest.mark.parametrize(
    ("name", "status", "retry"),
    [
        ("budget", 400, "false"),
        ("conflict", 409, "false"),
        ("missing", 404, "false"),
        ("denied", 403, "false"),
        ("unknown", 401, "false"),
        ("later", 503, None),
    ],
)
def test_a_domain_error_is_rendered_as_it_is(client: TestClient, name: str, status: int, retry: str | None) -> None:
    response = client.get(f"/probe/error/{name}")
    expected = ERRORS[name]
    error = _error(response, status)
    wire = (expected.code, expected.message, expected.param, expected.type)
    assert (error["code"], error["message"], error["param"], error["type"]) == wire
    assert expected.extra.items() <= error.items()
    assert response.headers.get("x-should-retry") == retry
    assert ("retry-after" in response.headers) == (status == 503)
    assert ("www-authenticate" in response.headers) == (status == 401)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "model", "is required"),
        ({"model": ROW}, "model", "at most 8"),
        ({"model": 3}, "model", "must be a string"),
        ({"model": "m", "epochs": ROW}, "epochs", "must be an integer"),
        ({"model": "m", "epsilon": ROW}, "epsilon", "must be a number"),
        ({"model": "m", "epsilon": -1}, "epsilon", "must be greater than 0"),
        ({"model": "m", "adaptation": {"type": ROW}}, "adaptation", "'head', 'lora'"),
        ({"model": "m", "adaptation": {"n": 1}}, "adaptation", "needs a type"),
        ({"model": "m", "adaptation": {"type": "head", "n": 99}}, "adaptation.head.n", "must be at most 12"),
        ({"model": "m", "metadata": {ROW: 1}}, "metadata.*", "must be a string"),
        ({"model": "m", "metadata": {"a": "", "b": "", "c": ROW}}, "metadata", "must have at most 2 pairs"),
        ({"model": "m", "suffix": ROW}, "suffix", "must match"),
        ({"model": "m", "columns": [1, ROW]}, "columns.1", "must be an integer"),
        ({"model": "m", "no_such_field": ROW}, "no_such_field", "is not a field"),
        ({"model": "m", ROW: 1}, "*", "is not a field"),
        ([ROW], None, "must be an object"),
    ],
)
def test_a_bad_body_names_the_field_and_never_the_value(
    client: TestClient, body: Any, param: str | None, message: str
) -> None:
    response = client.post("/probe/body", json=body)
    error = _error(response, 400)
    assert (error["code"], error["type"], error["param"]) == ("invalid_request", "invalid_request_error", param)
    assert message in error["message"]
    assert response.headers["x-should-retry"] == "false"


def test_several_mistakes_are_told_at_once(client: TestClient) -> None:
    error = _error(client.post("/probe/body", json={"epsilon": 0, "columns": "x"}), 400)
    assert [e["param"] for e in error["errors"]] == ["model", "epsilon", "columns"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"model": ' + ROW.encode(), b"\xff\xfe", b'{"epsilon": NaN}'])
def test_a_body_that_is_no_json(client: TestClient, content: bytes) -> None:
    _error(client.post("/probe/body", content=content, headers={"content-type": "application/json"}), 400)


def test_query_and_form_parameters(client: TestClient) -> None:
    assert _error(client.get("/probe/query", params={"limit": ROW}), 400)["param"] == "limit"
    assert _error(client.post("/probe/form", data={"expires": ROW}), 400)["param"] == "expires"
    broken = client.post(
        "/probe/form", content=ROW.encode(), headers={"content-type": "multipart/form-data; boundary=x"}
    )
    _error(broken, 400)


def test_a_mistake_of_ours_tells_nothing(client: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("/probe/bug", "/probe/bug-in-transaction"):
        response = client.get(path)
        error = _error(response, 500)
        assert (error["code"], error["type"]) == ("internal_error", "server_error")
        assert "x-should-retry" not in response.headers


def test_a_database_that_does_not_answer_is_worth_a_retry(client: TestClient) -> None:
    response = client.get("/probe/database")
    assert _error(response, 503)["code"] == "database_unavailable"
    assert "x-should-retry" not in response.headers


def test_unknown_routes_and_methods(client: TestClient) -> None:
    assert _error(client.get(f"/v1/{ROW}"), 404)["code"] == "route_not_found"
    response = client.put("/healthz")
    assert _error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "GET"
    assert response.headers["x-should-retry"] == "false"


def test_every_answer_has_a_request_id(client: TestClient) -> None:
    first, second = (client.get("/healthz").headers["x-request-id"] for _ in range(2))
    assert first.startswith("req-")
    assert first != second
    given = {"x-request-id": "proxy-12345678"}
    assert client.get("/healthz", headers=given).headers["x-request-id"] == "proxy-12345678"
    for hostile in ("x", "a b c d e f g h", "<script>alert(1)", "a" * 65):
        assert client.get("/healthz", headers={"x-request-id": hostile}).headers["x-request-id"].startswith("req-")


def _many(chunks: int) -> Iterator[bytes]:
    """A body of unknown length."""
    yield b'{"model": "'
    yield from (b"x" * 2**16 for _ in range(chunks))
    yield b'"}'


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x", "text/plain"])
def test_a_body_that_is_no_upload_is_limited(client: TestClient, content_type: str) -> None:
    headers = {"content-type": content_type, "authorization": ""}
    for content in (b"x" * (MAX_BODY + 1), _many(17)):
        response = client.post("/probe/body", content=content, headers=headers)
        assert _error(response, 413)["code"] == "payload_too_large"
        assert response.headers["x-should-retry"] == "false"
    _error(client.post("/probe/body", content=_many(15), headers=headers), 400)


@pytest.mark.every_database
def test_text_that_a_database_cannot_hold_is_no_mistake_of_ours(client: TestClient) -> None:
    """U+0000, which SQLite keeps and PostgreSQL does not."""
    upload = {"bytes": 9, "filename": "a.csv", "mime_type": "text/csv", "purpose": "fine-tune"}
    answers = [
        client.get("/v1/files/%00"),
        client.get("/v1/files?after=%00"),
        client.get("/v1/uploads/%00/parts"),
        client.post("/v1/uploads", json={**upload, "privacy_budget": "pb\0"}),
        client.post("/v1/uploads", json={**upload, "privacy_unit": {"column": "a\0"}}),
        client.post(
            "/v1/files",
            files={"file": ("a.csv", b"a,b\n1,2\n")},
            data={"purpose": "fine-tune", "privacy_unit": '{"column": "a\\u0000"}'},
        ),
    ]
    assert [answer.status_code for answer in answers if answer.status_code not in (400, 404)] == []
    assert {answer.json()["error"]["type"] for answer in answers} <= {"invalid_request_error", "not_found_error"}
