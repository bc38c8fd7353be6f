"""What the unmodified client makes of our errors, over a real socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
from fastapi import APIRouter, FastAPI
from starlette.requests import Request

from app.errors import BudgetExceeded, Conflict, InvalidRequest, NotFound, ServiceUnavailable
from app.http.deps import Admin
from tests.conftest import LiveServer

router = APIRouter(prefix="/v1/probe")
calls: dict[str, int] = {}

ERRORS = {
    "invalid": (InvalidRequest("invalid_column", "No such column.", param="task.columns.text"), openai.BadRequestError),
    "budget": (
        BudgetExceeded("budget_exceeded", "2.5 is left.", param="privacy", epsilon_remaining=2.5),
        openai.BadRequestError,
    ),
    "missing": (NotFound("file", param="training_file"), openai.NotFoundError),
    "conflict": (Conflict("file_in_use", "A job needs this file."), openai.ConflictError),
    "later": (ServiceUnavailable("later", "Not now."), openai.InternalServerError),
}


@router.post("/{name}")
def fail(name: str) -> None:
    calls[name] = calls.get(name, 0) + 1
    raise ERRORS[name][0]


@router.post("/checked/body")
def checked(body: dict[str, int], request: Request) -> None:
    """Takes numbers."""


@router.get("/admin/only")
def admin_only(caller: Admin) -> None:
    """Takes admins."""


@pytest.fixture
def openai_client(app: FastAPI, openai_client: openai.OpenAI) -> openai.OpenAI:
    calls.clear()
    app.include_router(router)
    return openai_client


def _post(client: openai.OpenAI, path: str, body: Any = None) -> None:
    client.post(path, cast_to=object, body=body)


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_arrives_as_its_own_class_with_message_param_and_code(openai_client: openai.OpenAI, name: str) -> None:
    expected, kind = ERRORS[name]
    with pytest.raises(kind) as caught:
        _post(openai_client, f"/probe/{name}")
    error = caught.value
    assert (error.code, error.param, error.type) == (expected.code, expected.param, expected.type)
    assert expected.message in error.message
    assert error.request_id
    assert expected.extra.items() <= error.body.items()
    assert calls[name] == (3 if name == "later" else 1), "a conflict is not sent again, a passing failure is"


def test_validation_arrives_with_the_field(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        _post(openai_client, "/probe/checked/body", {"epochs": "secret words"})
    assert (caught.value.code, caught.value.param) == ("invalid_request", "epochs")
    assert "must be an integer" in caught.value.message
    assert "secret" not in str(caught.value)


def test_an_unknown_route_and_an_unknown_model(openai_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        openai_client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])
    assert caught.value.code == "route_not_found"
    assert "nothing at this address" in caught.value.message


def test_keys(openai_client: openai.OpenAI, live_server: LiveServer, make_key: Callable[..., str]) -> None:
    url = f"{live_server.url}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="pt-wrong") as stranger,
        pytest.raises(openai.AuthenticationError) as unknown,
    ):
        stranger.get("/probe/admin/only", cast_to=object)
    assert unknown.value.code == "invalid_api_key"
    with (
        openai.OpenAI(base_url=url, api_key=make_key("submit")) as submitter,
        pytest.raises(openai.PermissionDeniedError) as denied,
    ):
        submitter.get("/probe/admin/only", cast_to=object)
    assert denied.value.code == "insufficient_scope"
    assert "`admin`" in denied.value.message
    openai_client.get("/probe/admin/only", cast_to=object)
