"""Liveness says that the process answers, readiness that all it depends on does."""

from __future__ import annotations

import shutil

from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import event

ALL = {"database": "ok", "storage": "ok", "broker": "ok"}


def test_ready_when_everything_answers(client: TestClient, broker: str) -> None:
    response = client.get("/readyz", headers={"authorization": ""})
    assert (response.status_code, response.json()) == (200, {"status": "ready", "checks": ALL})


def test_not_ready_without_a_broker_but_alive(client: TestClient) -> None:
    response = client.get("/readyz")
    assert (response.status_code, response.json()["checks"]) == (503, {**ALL, "broker": "failed"})
    assert client.get("/healthz").json() == {"status": "ok"}


def test_not_ready_without_the_database(client: TestClient, app: FastAPI, broker: str) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("gone")

    event.listen(app.state.database.engine, "before_cursor_execute", fail)
    response = client.get("/readyz")
    assert (response.status_code, response.json()["checks"]) == (503, {**ALL, "database": "failed"})


def test_not_ready_without_the_storage(client: TestClient, app: FastAPI, broker: str) -> None:
    folder = app.state.settings.data_dir / "storage"
    shutil.rmtree(folder)
    folder.write_text("a file where the folder was")
    response = client.get("/readyz")
    assert (response.status_code, response.json()["checks"]) == (503, {**ALL, "storage": "failed"})
