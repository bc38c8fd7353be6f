"""One project's objects do not exist for another: every route that takes an id answers as for an id that nobody has.

The routes are read from the OpenAPI document; one with an id of a new kind fails here until it is given an object.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.budgets import service as budgets
from app.catalog.bases import BASES
from app.db.session import Database
from app.exports import service as exports
from app.files import processing
from app.models import archives
from app.models import service as models
from app.settings import Settings

METHODS = {"get", "post", "delete", "put", "patch"}
CARD = b"# A model\n"


@pytest.fixture
def objects(
    client: TestClient, app: FastAPI, database: Database, settings: Settings, project_id: str
) -> dict[str, str]:
    """An object of the default project for every path parameter."""
    rows = b"text,label\n" + b"".join(b"words,%d\n" % (number % 2) for number in range(100))
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.csv", rows)}).json()
    job = client.post("/v1/fine_tuning/jobs", json={"model": "all-MiniLM-L6-v2", "training_file": file["id"]}).json()
    upload = client.post(
        "/v1/uploads", json={"bytes": 1, "filename": "a.csv", "mime_type": "text/csv", "purpose": "fine-tune"}
    ).json()
    storage = app.state.storage
    assert processing.process(database, storage, settings, file["id"])  # so that it has a report
    storage.put_bytes("probe/README.md", CARD)
    files = [{"path": "README.md", "bytes": len(CARD), "sha256": sha256(CARD).hexdigest(), "crc32": zlib.crc32(CARD)}]
    with database.writing() as session:
        model = models.publish(
            session,
            project_id=project_id,
            job_id=job["id"],
            base="all-MiniLM-L6-v2",
            suffix=None,
            storage_prefix="probe",
            files=files,
            archives=archives.describe(files, lambda path: storage.stream(f"probe/{path}")),
            metrics={},
            privacy_report={},
            base_facts=BASES["all-MiniLM-L6-v2"].to_dict(),
        )
        budget = budgets.default_for(session, project_id)
        export, _ = exports.request(session, model, "safetensors", None)
        export.status, export.storage_prefix, export.files, export.archives = (
            "succeeded",
            "probe",
            files,
            dict(model.archives),
        )
    return {
        "file_id": file["id"],
        "job_id": job["id"],
        "model_id": model.id,
        "base_model_id": model.id,
        "budget_id": budget.id,
        "export_id": export.id,
        "upload_id": upload["id"],
        "path": "README.md",
    }


def _routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    for path, operations in app.openapi()["paths"].items():
        for method in operations.keys() & METHODS:
            if "{" in path:
                yield method, path


def _answer(client: TestClient, method: str, path: str, key: str | None = None) -> tuple[int, Any]:
    response = client.request(method, path, headers={"authorization": f"Bearer {key}"} if key else None)
    return response.status_code, response.json() if response.status_code >= 400 else None


def test_the_owner_reaches_every_object(client: TestClient, app: FastAPI, objects: dict[str, str]) -> None:
    """Without this the other test would pass on routes that find nothing at all."""
    for method, path in _routes(app):
        if method == "get" and not path.endswith("/download"):
            assert _answer(client, method, path.format(**objects))[0] == 200, path
    assert _answer(client, "get", f"/v1/models/{objects['model_id']}/download?format=zip")[0] == 200


@pytest.mark.parametrize("scope", ["read", "submit", "admin"])
def test_a_foreign_object_answers_as_one_that_nobody_has(
    client: TestClient, app: FastAPI, objects: dict[str, str], make_key: Callable[..., str], scope: str
) -> None:
    key = make_key(scope, project="other")
    nobodys = {name: value[:-6] + "000000" for name, value in objects.items()} | {"path": objects["path"]}
    found = 0
    for method, path in _routes(app):
        foreign = _answer(client, method, path.format(**objects), key)
        assert foreign == _answer(client, method, path.format(**nobodys), key), (method, path)
        assert foreign[0] in (400, 403, 404), (method, path)
        found += foreign[0] == 404
    assert found >= 10
    for name, path in (("file_id", "files"), ("job_id", "fine_tuning/jobs"), ("model_id", "models")):
        assert _answer(client, "get", f"/v1/{path}/{objects[name]}")[0] == 200, "and it is still there"


def test_a_foreign_object_is_in_no_list(
    client: TestClient, app: FastAPI, objects: dict[str, str], make_key: Callable[..., str]
) -> None:
    stranger = {"authorization": f"Bearer {make_key('admin', project='other')}"}
    for path in [path for path, operations in app.openapi()["paths"].items() if "get" in operations]:
        if "{" not in path and path.startswith("/v1/"):
            text = client.get(path, headers=stranger).text
            assert [name for name, value in objects.items() if value in text] == [], path


def test_a_foreign_object_cannot_be_named_in_a_request(
    client: TestClient, objects: dict[str, str], make_key: Callable[..., str]
) -> None:
    stranger = {"authorization": f"Bearer {make_key('admin', project='other')}"}
    for verb in ("", "/estimate"):
        body = {"model": "all-MiniLM-L6-v2", "training_file": objects["file_id"]}
        response = client.post(f"/v1/fine_tuning/jobs{verb}", json=body, headers=stranger)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "file_not_found")
    form = {"purpose": "fine-tune", "privacy_budget": objects["budget_id"]}
    response = client.post("/v1/files", data=form, files={"file": ("rows.csv", b"text,label\na,1\n")}, headers=stranger)
    assert response.status_code == 404
    for path in ("files", "fine_tuning/jobs", "privacy_budgets"):
        response = client.get(f"/v1/{path}", params={"after": objects["file_id"]}, headers=stranger)
        assert response.json()["error"]["code"] == "invalid_after"
