"""One line in the log for each request: who, which route, how it ended; nothing that the client wrote."""

from __future__ import annotations

import json

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from app.http.deps import Reader

ROW = "Zymurgy-4711"

router = APIRouter()


@router.get("/probe/{name}")
def probe(name: str, caller: Reader) -> str:
    if name != "fine":
        raise LookupError(name)
    return name


@pytest.fixture
def client(app: FastAPI, client: TestClient) -> TestClient:
    app.include_router(router)
    return client


def test_a_request_is_logged_by_ids(client: TestClient, project_id: str) -> None:
    with capture_logs() as lines:
        request_id = client.get("/probe/fine", params={"metadata[name]": ROW}).headers["x-request-id"]
    (line,) = lines
    assert (line["event"], line["status"], line["method"]) == ("request", 200, "GET")
    assert (line["route"], line["project_id"]) == ("/probe/{name}", project_id)
    assert line["key_id"].startswith("key-")
    assert line["milliseconds"] >= 0
    assert request_id.startswith("req-")
    assert ROW not in json.dumps(lines)


def test_a_stranger_and_an_unknown_address_are_logged_without_what_they_sent(client: TestClient) -> None:
    with capture_logs() as lines:
        client.get("/probe/fine", headers={"authorization": f"Bearer {ROW}"})
        client.get(f"/v1/{ROW}")
    assert [(line["status"], line["project_id"]) for line in lines] == [(401, None), (404, None)]
    assert ROW not in json.dumps(lines)


def test_a_mistake_of_ours_is_logged_with_its_place(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    assert client.get(f"/probe/{ROW}").status_code == 500
    failed = next(json.loads(r.message) for r in caplog.records if "request_failed" in r.message)
    assert failed["error"] == "LookupError"
    assert failed["frames"][-1].endswith("probe")
    assert failed["request_id"].startswith("req-")
    assert ROW not in caplog.text
