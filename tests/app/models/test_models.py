"""Models over HTTP: listed, downloaded in every way, deleted."""

from __future__ import annotations

import hashlib
import io
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.catalog.bases import BASES
from app.db.session import Database
from app.models import catalog, service
from app.models.tables import Model
from app.settings import Settings
from tests.app.models.conftest import BUNDLE

BASE = "all-MiniLM-L6-v2"


def stored(settings: Settings) -> list[Path]:
    return [path for path in (settings.data_dir / "storage").rglob("*") if path.is_file()]


def test_models_are_bases_and_ones_own(client: TestClient, publish: Callable[..., str]) -> None:
    first, second = publish(), publish()
    answer = client.get("/v1/models").json()
    assert [model["id"] for model in answer["data"]] == [*BASES, second, first]
    base = client.get(f"/v1/models/{BASE}").json()
    assert (base["object"], base["owned_by"]) == ("model", "catalog")
    model = client.get(f"/v1/models/{first}").json()
    assert model["base_model"] == BASE
    assert model["metrics"] == {"accuracy": 0.9}
    assert model["privacy_report"] == {"epsilon": 3.0}
    assert model["created"] > 0


def test_the_catalog_is_shown(client: TestClient) -> None:
    (base,) = [base for base in client.get("/v1/base_models").json()["data"] if base["id"] == BASE]
    assert base["sha256"] == BASES[BASE].digest
    task, *_ = client.get("/v1/tasks").json()["data"]
    assert task["type"] == "text_classification"
    assert [column["role"] for column in task["columns"]] == ["text", "text_pair", "label"]


@pytest.mark.parametrize(
    ("base", "suffix", "expected"),
    [
        (BASE, "mine", r"ft-all-MiniLM-L6-v2-mine-[0-9a-z]{8}"),
        (BASE, None, r"ft-all-MiniLM-L6-v2-[0-9a-z]{8}"),
        ("org/model", "Größe & co./../x", r"ft-org-model-Gr-e-co\.x-[0-9a-z]{8}"),
        ("b" * 200, "s" * 64, r"ft-b{19}-s{64}-[0-9a-z]{8}"),
        ("ft-all-MiniLM-L6-v2-mine-0a1b2c3d", None, r"ft-all-MiniLM-L6-v2-mine-[0-9a-z]{8}"),
        (BASE, "...--", r"ft-all-MiniLM-L6-v2-[0-9a-z]{8}"),
    ],
)
def test_ids_are_path_segments_and_repository_names(base: str, suffix: str | None, expected: str) -> None:
    identifier = service.model_id(base, suffix)
    assert re.fullmatch(expected, identifier), identifier
    assert len(identifier) <= 96
    assert identifier != service.model_id(base, suffix)


def test_every_file_of_a_bundle_can_be_downloaded(client: TestClient, publish: Callable[..., str]) -> None:
    model = publish()
    listed = client.get(f"/v1/models/{model}/files").json()
    assert [file["path"] for file in listed["data"]] == list(BUNDLE)
    for file in listed["data"]:
        answer = client.get(f"/v1/models/{model}/files/{file['path']}")
        assert answer.content == BUNDLE[file["path"]]
        assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
        head = client.head(f"/v1/models/{model}/files/{file['path']}")
        assert head.content == b""
        assert head.headers["content-length"] == str(file["bytes"])
        assert head.headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize(
    "path", ["trainer.log", "../../../x", "%2e%2e/1/config.json", "config.json/", "CONFIG.JSON", "1/config.json", ""]
)
def test_nothing_else_can(client: TestClient, publish: Callable[..., str], path: str) -> None:
    assert client.get(f"/v1/models/{publish()}/files/{path}", follow_redirects=False).status_code == 404


@pytest.mark.parametrize("format_", ["tar", "zip"])
def test_an_archive_resumes_where_it_was_cut(client: TestClient, publish: Callable[..., str], format_: str) -> None:
    url = f"/v1/models/{publish()}/download?format={format_}"
    answer = client.get(url)
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    assert answer.headers["content-length"] == str(len(answer.content))
    head = client.head(url)
    assert head.headers["etag"] == answer.headers["etag"]
    assert head.headers["content-length"] == str(len(answer.content))
    got = answer.content[:1000]
    while len(got) < len(answer.content):
        part = client.get(
            url, headers={"range": f"bytes={len(got)}-{len(got) + 99_999}", "if-range": answer.headers["etag"]}
        )
        assert part.status_code == 206
        assert part.headers["content-range"].startswith(f"bytes {len(got)}-")
        got += part.content
    assert got == answer.content
    if format_ == "tar":
        with tarfile.open(fileobj=io.BytesIO(got)) as tar:
            assert tar.getnames() == [f"model/{path}" for path in BUNDLE]
    else:
        with zipfile.ZipFile(io.BytesIO(got)) as archive:
            assert archive.testzip() is None


def test_an_unknown_archive_is_refused(client: TestClient, publish: Callable[..., str]) -> None:
    answer = client.get(f"/v1/models/{publish()}/download?format=rar")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "format")


def test_another_project_sees_nothing(
    client: TestClient, publish: Callable[..., str], make_key: Callable[..., str]
) -> None:
    model = publish()
    headers = {"authorization": f"Bearer {make_key('admin', project='other')}"}
    missing = client.get("/v1/models/ft-none", headers=headers).json()
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/files"), ("GET", "/files/config.json")):
        answer = client.request(method, f"/v1/models/{model}{path}", headers=headers)
        assert (answer.status_code, answer.json()) == (404, missing)
    assert client.get(f"/v1/models/{model}/download", headers=headers).status_code == 404
    assert [model["id"] for model in client.get("/v1/models", headers=headers).json()["data"]] == list(BASES)


def test_a_deleted_model_leaves_a_row_and_no_bytes(
    client: TestClient,
    publish: Callable[..., str],
    make_key: Callable[..., str],
    settings: Settings,
    database: Database,
) -> None:
    model, other = publish(), publish()
    reading = {"authorization": f"Bearer {make_key('read')}"}
    assert client.delete(f"/v1/models/{model}", headers=reading).status_code == 403
    assert client.delete(f"/v1/models/{model}").json() == {"id": model, "object": "model", "deleted": True}
    assert client.get(f"/v1/models/{model}").status_code == 404
    assert client.delete(f"/v1/models/{model}").status_code == 404
    assert len(stored(settings)) == len(BUNDLE)
    with database.reading() as session:
        assert session.get_one(Model, model).erased_at is not None
    assert client.get(f"/v1/models/{other}/download").status_code == 200
    answer = client.delete(f"/v1/models/{BASE}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "base_model")


def test_a_sweep_erases_what_a_crash_left(
    publish: Callable[..., str], app: FastAPI, database: Database, settings: Settings
) -> None:
    model, _ = publish(), publish()
    with database.writing() as session:
        session.get_one(Model, model).deleted_at = 1.0
    service.sweep(database, app.state.storage)
    assert len(stored(settings)) == len(BUNDLE)
    with database.reading() as session:
        assert session.get_one(Model, model).erased_at is not None


@pytest.mark.parametrize("path", ["training_args.bin", "model.bin", "../config.json", "events.log"])
def test_only_what_is_on_the_list_is_published(publish: Callable[..., str], path: str) -> None:
    with pytest.raises(ValueError, match=r"not on its list|not a storage key"):
        publish({**BUNDLE, path: b"x"})


@pytest.mark.every_database
def test_publishing_on_both_databases(publish: Callable[..., str], client: TestClient) -> None:
    assert client.get(f"/v1/models/{publish()}").status_code == 200


def test_the_base_lies_in_its_package_and_is_checked(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BASES[BASE]
    found = service.find_base(settings, BASE)
    assert found is not None
    assert found.to_dict() == base.to_dict()
    assert service.find_base(settings, "none") is None
    assert (service.base_path(base) / "config.json").is_file()

    package = tmp_path / base.package
    (package / base.path).mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a base is never imported')")
    weights = package / base.path / "model.safetensors"
    weights.write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, base.package, raising=False)  # where another test has imported it
    with pytest.raises(catalog.BaseModelUnavailable, match="not the catalog's"):
        service.base_path(base)
    weights.unlink()
    with pytest.raises(catalog.BaseModelUnavailable, match="not installed"):
        service.base_path(base)


def test_the_openai_client(openai_client: openai.OpenAI, publish: Callable[..., str]) -> None:
    model = publish()
    assert model in [each.id for each in openai_client.models.list()]
    found: Any = openai_client.models.retrieve(model)
    assert found.object == "model"
    assert found.privacy_report == {"epsilon": 3.0}
    assert openai_client.models.delete(model).deleted is True
    with pytest.raises(openai.NotFoundError) as missing:
        openai_client.models.retrieve(model)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("org/none")


def test_the_list_of_tasks_says_what_each_takes_and_releases(client: TestClient) -> None:
    tasks = {task["type"]: task for task in client.get("/v1/tasks").json()["data"]}
    translation, tags = tasks["translation"], tasks["token_classification"]
    assert {"source_lang", "target_lang", "source_prefix"} <= {*translation["options"]}
    assert (translation["metrics"][0], translation["public_metrics"][:2]) == ("loss", ["bleu", "chrf"])
    assert "entity_f1" in tags["public_metrics"]
    assert tasks["text_regression"]["options"] == ["range"]
