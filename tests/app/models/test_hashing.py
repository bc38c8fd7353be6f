"""No request waits for the hashing of weights that it does not name, and none hashes in a unit of work."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db.session import Database
from app.models import digests
from app.settings import Settings
from tests.app.models.folders import CONFIG, make_folder
from tests.running import until


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    for name in ("slow", "quick"):
        make_folder(tmp_path / "models" / name)
    return settings.model_copy(update={"models_dir": tmp_path / "models"})


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, hashing the weights of `slow` takes for ever."""
    opened = threading.Event()
    real = hashlib.file_digest

    def wait(file: Any, kind: str) -> Any:
        if "slow" in Path(file.name).parts:
            assert opened.wait(60)
        return real(file, kind)

    monkeypatch.setattr(digests.hashlib, "file_digest", wait)
    yield opened
    opened.set()


def test_lists_and_other_models_do_not_wait(gate: threading.Event, client: TestClient, settings: Settings) -> None:
    def shown() -> dict[str, Any]:
        return {base["id"]: base["sha256"] for base in client.get("/v1/base_models").json()["data"]}

    assert {"slow", "quick"} <= {model["id"] for model in client.get("/v1/models").json()["data"]}
    assert shown()["slow"] is None
    assert client.get("/v1/models/slow").json()["owned_by"] == "catalog"
    assert client.get("/v1/base_models/quick").json()["sha256"] is not None
    gate.set()
    until(lambda: shown()["slow"] is not None, 20)
    assert settings.models_dir is not None
    weights = (settings.models_dir / "slow" / "model.safetensors").read_bytes()
    assert shown()["slow"] == hashlib.sha256(weights).hexdigest()


def test_a_refused_delete_holds_no_transaction_meanwhile(gate: threading.Event, client: TestClient) -> None:
    answer = client.delete("/v1/models/slow")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "base_model")


def test_a_submit_hashes_what_it_names_outside_of_any_transaction(
    gate: threading.Event, client: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = client.post("/v1/files", files={"file": ("a.csv", b"text,label\na,b\n")}, data={"purpose": "fine-tune"})
    open_now: list[str] = []
    seen: list[list[str]] = []
    for kind in ("reading", "writing"):
        real = getattr(Database, kind)

        class Noted:
            def __init__(self, own: Database, kind: str = kind, real: Any = real) -> None:
                self._kind, self._inner = kind, real(own)

            def __enter__(self) -> Any:
                open_now.append(self._kind)
                return self._inner.__enter__()

            def __exit__(self, *failure: Any) -> Any:
                open_now.remove(self._kind)
                return self._inner.__exit__(*failure)

        monkeypatch.setattr(Database, kind, lambda own, noted=Noted: noted(own))
    digest = digests.sha256
    monkeypatch.setattr(digests, "sha256", lambda *given: seen.append(list(open_now)) or digest(*given))
    body = {"model": "quick", "training_file": file.json()["id"]}
    assert client.post("/v1/fine_tuning/jobs", json=body).status_code == 200
    assert client.post("/v1/fine_tuning/jobs/estimate", json=body).status_code == 409
    assert client.get("/v1/base_models/quick").status_code == 200
    assert seen == [[], [], []]


def test_a_base_that_is_called_as_a_route_is_found(client: TestClient, settings: Settings) -> None:
    assert settings.models_dir is not None
    names = [f"org/{name}" for name in ("exports", "files", "download", "privacy_report")]
    for name in names:
        make_folder(settings.models_dir / name)
    for name in names:
        answer = client.get(f"/v1/models/{name.replace('/', '%2F')}")
        assert (answer.status_code, answer.json().get("id")) == (200, name)


def test_a_model_at_a_revision_is_not_there(client: TestClient) -> None:
    for name in ("x@y", "org/x@y"):
        answer = client.get(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_base_without_its_head_is_refused_before_anything_is_charged(client: TestClient, settings: Settings) -> None:
    assert settings.models_dir is not None
    make_folder(settings.models_dir / "headless", config__json={**CONFIG, "model_type": "llama"})
    file = client.post("/v1/files", files={"file": ("a.csv", b"text\na\n")}, data={"purpose": "fine-tune"}).json()
    answer = client.post("/v1/fine_tuning/jobs", json={"model": "headless", "training_file": file["id"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "base_model_refused")
    assert answer.json()["error"]["reason"] == "no_head"
    assert client.get("/v1/fine_tuning/jobs").json()["data"] == []
