"""Uploads through the application, and their processing as the worker does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.db.session import Database
from app.files import service
from app.settings import Settings

Upload = Callable[..., dict[str, Any]]


@pytest.fixture
def upload(client: TestClient) -> Upload:
    """Uploads bytes and gives the file object."""

    def send(data: bytes, filename: str = "data.csv", **fields: str) -> dict[str, Any]:
        answer = client.post("/v1/files", files={"file": (filename, data)}, data={"purpose": "fine-tune", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()

    return send


@pytest.fixture
def process(
    app: FastAPI, client: TestClient, database: Database, settings: Settings
) -> Callable[[str], dict[str, Any]]:
    """Processes a file in a child process and gives the file object."""

    def run(file_id: str) -> dict[str, Any]:
        assert service.process(database, app.state.storage, settings, file_id)
        return client.get(f"/v1/files/{file_id}").json()

    return run
