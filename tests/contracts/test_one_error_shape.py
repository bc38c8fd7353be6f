"""Every route answers errors in one shape, asks for a key, and echoes nothing.

The routes are read from the OpenAPI document itself, so that a new one is held to it without being named here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings

#: Stands for a private row.
ROW = "Zymurgy4711"
#: The same where a field's name should be. (A name that is plainly one is told: it may be a typing error.)
KEY = f"{ROW}, 1987"

#: Open to everyone.
OPEN = {"/healthz", "/readyz"}

METHODS = {"get", "post", "put", "patch", "delete", "head"}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("contract")
    return create_app(Settings(data_dir=folder, database_url=f"sqlite:///{folder}/none.db")).openapi()


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method in METHODS:
                yield path, method, operation


def _fill(path: str) -> str:
    while "{" in path:
        start, end = path.index("{"), path.index("}")
        path = path[:start] + ROW + path[end + 1 :]
    return path


def _check(response: Any) -> dict[str, Any]:
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert isinstance(error["message"], str)
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["code"], "every error has a fixed code"
    assert response.headers["x-request-id"]
    assert ROW not in response.text + str(response.headers)
    if response.status_code not in (408, 429):
        assert response.headers["x-should-retry"] == "false"
    return error


def test_there_is_something_to_check(document: dict[str, Any]) -> None:
    paths = {path for path, _, _ in _operations(document)}
    assert {"/v1/files", "/v1/fine_tuning/jobs", "/v1/models", "/v1/privacy_budgets", "/healthz"} <= paths


def test_the_document_names_our_shape_and_not_the_frameworks(document: dict[str, Any]) -> None:
    assert "HTTPValidationError" not in document.get("components", {}).get("schemas", {})
    for path, method, operation in _operations(document):
        assert "422" not in operation["responses"], (path, method)
        if path.startswith("/v1/"):
            shape = operation["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"]
            assert shape.endswith("/Envelope"), (path, method)
            assert operation["security"], (path, method)


def test_no_route_answers_a_stranger(client: TestClient, document: dict[str, Any]) -> None:
    for path, method, _ in _operations(document):
        if path in OPEN:
            continue
        response = client.request(method, _fill(path), headers={"authorization": ""})
        assert response.status_code == 401, (path, method)
        if method != "head":
            assert _check(response)["type"] == "authentication_error"


def test_a_foreign_object_and_a_missing_one_answer_alike(
    client: TestClient, document: dict[str, Any], make_key: Callable[..., str]
) -> None:
    stranger = {"authorization": f"Bearer {make_key('admin', project='other')}"}
    answers = []
    for path, method, operation in _operations(document):
        if "{" not in path or "requestBody" in operation or method == "head":
            continue
        for headers in ({}, stranger):
            response = client.request(method, _fill(path), headers=headers)
            assert response.status_code in (400, 404), (path, method, response.text)
            answers.append(_check(response)["code"])
    assert any(code.endswith("_not_found") for code in answers)


def _bodies(document: dict[str, Any], operation: dict[str, Any]) -> Iterator[Any]:
    """Bodies that are wrong in one place each: every property, one level of nesting included."""
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" not in content:
        return
    schema = content["application/json"]["schema"]
    yield from (ROW, [ROW], 4711, None, {}, {KEY: ROW})
    yield from _objects(document, schema, depth=3)


def _objects(document: dict[str, Any], schema: dict[str, Any], depth: int) -> Iterator[dict[str, Any]]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for variant in schema.get("anyOf", []) + schema.get("oneOf", []):
        yield from _objects(document, variant, depth)
    required = {name: ROW for name in schema.get("required", [])}
    for name, inner in schema.get("properties", {}).items():
        for wrong in (ROW, -4711, [ROW], {KEY: ROW}, {"type": ROW}, None):
            yield {**required, name: wrong}
        if depth:
            for value in _objects(document, inner, depth - 1):
                yield {**required, name: value}


def test_no_body_comes_back_in_an_error(client: TestClient, document: dict[str, Any]) -> None:
    refused = 0
    for path, method, operation in _operations(document):
        for body in _bodies(document, operation):
            response = client.request(method, _fill(path), json=body)
            assert response.status_code < 500, (path, method, body, response.text)
            if response.status_code >= 400:
                _check(response)
                refused += 1
    assert refused > 100


def test_no_query_comes_back_in_an_error(client: TestClient, document: dict[str, Any]) -> None:
    for path, method, operation in _operations(document):
        for parameter in operation.get("parameters", []):
            if parameter["in"] != "query":
                continue
            for wrong in (ROW, f"-{ROW}", ROW * 20):
                response = client.request(method, _fill(path), params={parameter["name"]: wrong})
                assert response.status_code < 500, (path, method, parameter["name"])
                if response.status_code >= 400 and method != "head":
                    _check(response)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 5000, json.dumps({"a": ROW}).encode()[:-1], b'"\\ud800"'])
def test_no_broken_body_comes_back(client: TestClient, document: dict[str, Any], body: bytes) -> None:
    for path, method, operation in _operations(document):
        if "application/json" in operation.get("requestBody", {}).get("content", {}):
            response = client.request(method, _fill(path), content=body, headers={"content-type": "application/json"})
            assert 400 <= response.status_code < 500, (path, method, response.text)
            _check(response)
