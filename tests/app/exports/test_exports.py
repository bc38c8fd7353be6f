"""Exports over HTTP, and their rows in a worker's hands; what makes them is tested in tests/exporter."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.db.lease import LeaseLost
from app.db.session import Database
from app.exports import lifecycle
from app.exports.tables import Export
from app.files import service as files
from app.models import service as models
from app.models.tables import Model
from app.privacy import report_format
from app.settings import Settings
from tests.app.models.conftest import publish as publish

Publish = Callable[..., str]

FIGURES = {"weights_bytes": 10, "speedup": 1.5, "agreement": 1.0}
LORA = {"name": "adapt", "adaptation": {"type": "lora", "rank": 4}}
HEAD = {"name": "head", "adaptation": {"type": "head"}}


@pytest.fixture
def model(publish: Publish, database: Database) -> str:
    """A LoRA job's model, as its report tells."""
    model_id = publish()
    facts = [
        {"what": report_format.OPTIONS, "value": {"phases": [HEAD, LORA]}},
        {"what": report_format.COLUMN_NAMES, "value": {"text": "review", "label": "mood"}},
    ]
    with database.writing() as session:
        session.get_one(Model, model_id).privacy_report = {"treated_as_public": facts}
    return model_id


@pytest.fixture
def ask(client: TestClient, model: str) -> Callable[..., Any]:
    """POST …/exports of the model; the answer's JSON."""

    def post(format_: str, status: int = 200, **fields: Any) -> Any:
        answer = client.post(f"/v1/models/{model}/exports", json={"format": format_, **fields})
        assert answer.status_code == status, answer.text
        return answer.json() if status == 200 else answer.json()["error"]

    return post


@pytest.fixture
def finish(database: Database, app: FastAPI) -> Callable[[str], None]:
    """What a worker does that makes an export of one file."""

    def run(export_id: str) -> None:
        with database.writing() as session:
            claimed = lifecycle.claim(session, export_id, "test", 30.0)
        assert claimed is not None
        prefix = f"{claimed.prefix}/{claimed.fence}"
        app.state.storage.put_bytes(f"{prefix}/export.json", b"{}")
        file = {"path": "export.json", "bytes": 2, "sha256": "4" * 64, "crc32": 1}
        archives = {name: {"bytes": 10240, "sha256": "5" * 64} for name in ("tar", "zip")}
        fields = {"storage_prefix": prefix, "files": [file], "archives": archives, "metrics": FIGURES}
        with database.writing() as session:
            lifecycle.succeed(session, export_id, claimed.fence, fields)

    return run


def upload(client: TestClient, database: Database, settings: Settings, app: FastAPI, **fields: str) -> str:
    rows = "review,mood\n" + "".join(f"words {n},{n % 2}\n" for n in range(60))
    form = {"purpose": "fine-tune", **fields}
    answer = client.post("/v1/files", files={"file": ("rows.csv", rows.encode())}, data=form)
    assert answer.status_code == 200, answer.text
    files.process(database, app.state.storage, settings, answer.json()["id"])
    return answer.json()["id"]


def test_an_export_is_asked_for_once_and_found(client: TestClient, model: str, ask: Any, finish: Any) -> None:
    export = ask("fp16")
    assert (export["object"], export["status"], export["model"]) == ("model.export", "queued", model)
    assert export["privacy"]["epsilon"] == 0
    assert "no further epsilon" in export["privacy"]["statement"]
    assert ask("fp16") == export
    url = f"/v1/models/{model}/exports/{export['id']}"
    assert client.get(url).json() == export
    refused = client.get(f"{url}/files")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "export_not_finished")
    finish(export["id"])
    done = client.get(url).json()
    assert (done["status"], done["metrics"]) == ("succeeded", FIGURES)
    assert client.get(f"/v1/models/{model}").json()["metrics"]["exports"] == {"fp16": FIGURES}
    assert [entry["id"] for entry in client.get(f"/v1/models/{model}/exports").json()["data"]] == [export["id"]]
    assert [file["path"] for file in client.get(f"{url}/files").json()["data"]] == ["export.json"]
    assert client.get(f"{url}/files/export.json").content == b"{}"
    assert client.get(f"{url}/files/other.json").status_code == 404
    assert client.head(f"{url}/download").headers["content-length"] == "10240"
    assert ask("fp16")["status"] == "succeeded"


def test_a_deleted_export_is_gone_with_its_bytes_and_can_be_asked_for_again(
    client: TestClient, model: str, ask: Any, finish: Any, app: FastAPI, database: Database
) -> None:
    export = ask("bf16")
    finish(export["id"])
    with database.reading() as session:
        key = f"{session.get_one(Export, export['id']).storage_prefix}/export.json"
    assert app.state.storage.exists(key)
    url = f"/v1/models/{model}/exports/{export['id']}"
    assert client.delete(url).json() == {"id": export["id"], "object": "model.export", "deleted": True}
    assert client.get(url).json()["error"]["code"] == "export_not_found"
    assert not app.state.storage.exists(key)
    assert client.get(f"/v1/models/{model}").json()["metrics"]["exports"] == {}
    assert ask("bf16")["id"] != export["id"]


@pytest.mark.every_database
def test_figures_of_two_exports_that_end_at_once_are_both_kept(publish: Publish, database: Database) -> None:
    model_id = publish()
    with database.reading() as session:
        seen = session.get_one(Model, model_id)
    with database.writing() as session:
        assert models.note_export(session, model_id, "fp16", FIGURES)
    with database.writing() as session:
        session.add(seen)  # as this unit of work read it before the other committed
        assert models.note_export(session, model_id, "bf16", FIGURES)
    with database.reading() as session:
        assert session.get_one(Model, model_id).metrics["exports"] == {"fp16": FIGURES, "bf16": FIGURES}


def test_a_deleted_model_takes_its_exports_with_it(
    client: TestClient, model: str, ask: Any, finish: Any, app: FastAPI, database: Database, settings: Settings
) -> None:
    done, running = ask("fp16")["id"], ask("onnx")["id"]
    finish(done)
    with database.writing() as session:
        claimed = lifecycle.claim(session, running, "test", 30.0)
    assert claimed is not None
    with database.reading() as session:
        key = f"{session.get_one(Export, done).storage_prefix}/export.json"
    client.delete(f"/v1/models/{model}")
    assert not app.state.storage.exists(key)
    assert client.get(f"/v1/models/{model}/exports/{done}").json()["error"]["code"] == "model_not_found"
    fields = {"storage_prefix": "x", "files": [], "archives": {}, "metrics": FIGURES}
    with pytest.raises(LeaseLost), database.writing() as session:
        lifecycle.succeed(session, running, claimed.fence, fields)
    with database.writing() as session:
        lifecycle.sweep(session, settings)
    with pytest.raises(LeaseLost), database.writing() as session:
        lifecycle.heartbeat(session, running, claimed.fence, 30.0)


def test_only_a_lora_model_has_an_adapter(client: TestClient, publish: Publish, ask: Any) -> None:
    assert ask("adapter")["status"] == "queued"
    other = publish(suffix="other")
    refused = client.post(f"/v1/models/{other}/exports", json={"format": "adapter"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "format_not_supported")


def test_a_student_is_distilled_on_public_files_only(
    client: TestClient, model: str, ask: Any, app: FastAPI, database: Database, settings: Settings
) -> None:
    assert ask("student", 400)["code"] == "student_file_required"
    private = upload(client, database, settings, app)
    refused = ask("student", 400, student={"training_file": private})
    assert (refused["code"], refused["param"]) == ("file_not_public", "student.training_file")
    assert ask("student", 404, student={"training_file": "file-none"})["code"] == "file_not_found"
    public = client.post(
        "/v1/files",
        files={"file": ("other.csv", b"review,mood\n" + b"".join(b"other %d,1\n" % n for n in range(60)))},
        data={"purpose": "fine-tune", "public": "true"},
    ).json()["id"]
    assert ask("student", 409, student={"training_file": public})["code"] == "file_not_processed"
    files.process(database, app.state.storage, settings, public)
    bad = {"training_file": public, "columns": {"text": "nothing"}}
    assert ask("student", 400, student=bad)["code"] == "column_not_found"
    export = ask("student", student={"training_file": public, "num_layers": 2})
    assert export["student"] == {
        "training_file": public,
        "num_layers": 2,
        "n_epochs": 3,
        "columns": {"text": "review"},
    }
    assert ask("student", student={"training_file": public, "num_layers": 2})["id"] == export["id"]
    assert ask("student", 409, student={"training_file": public, "num_layers": 3})["code"] == "export_exists"
    refused = client.delete(f"/v1/files/{public}").json()["error"]
    assert refused["code"] == "file_in_use"
    assert "export" in refused["message"]
    client.delete(f"/v1/models/{model}/exports/{export['id']}")
    assert client.delete(f"/v1/files/{public}").status_code == 200


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"source_prefix": "summarize: "}, {"source_prefix": "summarize: "}),
        ({}, {}),
        ({"languages_of": "t5", "source_prefix": ""}, {"languages_of": "t5"}),
    ],
)
def test_a_student_of_a_model_that_writes_reads_sources_and_targets(
    client: TestClient,
    database: Database,
    settings: Settings,
    app: FastAPI,
    model: str,
    ask: Any,
    said: dict[str, str],
    told: dict[str, str],
) -> None:
    facts = [
        {"what": report_format.OPTIONS, "value": {"task": {"type": "translation", **said}, "phases": []}},
        {"what": report_format.COLUMN_NAMES, "value": {"source": "letter", "target": "brief"}},
    ]
    with database.writing() as session:
        session.get_one(Model, model).privacy_report = {"treated_as_public": facts}
    alone = upload(client, database, settings, app, public="true")  # has neither
    error = ask("student", 400, student={"training_file": alone})
    assert (error["code"], error["param"]) == ("column_not_found", "student.columns")
    rows = "letter,brief,from,to\n" + "".join(f"letter {n},brief {n},en,de\n" for n in range(60))
    form = {"purpose": "fine-tune", "public": "true"}
    public = client.post("/v1/files", files={"file": ("pairs.csv", rows.encode())}, data=form).json()["id"]
    files.process(database, app.state.storage, settings, public)
    student: dict[str, Any] = {"training_file": public}
    columns = {"source": "letter", "target": "brief"}
    if "languages_of" in told:
        assert "source_lang" in ask("student", 400, student=student)["message"]
        languages = {"source_lang": "from", "target_lang": "to"}
        student, columns = {**student, "columns": languages}, {**columns, **languages}
        told_by_tokens = {"task": {"type": "translation", "languages_of": "m2m_100"}, "phases": []}
        with database.writing() as session:
            other = [{"what": report_format.OPTIONS, "value": told_by_tokens}, facts[1]]
            session.get_one(Model, model).privacy_report = {"treated_as_public": other}
        assert ask("student", 400, student=student)["code"] == "format_not_supported"
        with database.writing() as session:
            session.get_one(Model, model).privacy_report = {"treated_as_public": facts}
        klingon = rows.replace(",en,de", ",en,kl")
        other = client.post("/v1/files", files={"file": ("odd.csv", klingon.encode())}, data=form).json()["id"]
        files.process(database, app.state.storage, settings, other)
        error = ask("student", 400, student={**student, "training_file": other})
        assert (error["code"], error["param"]) == ("invalid_languages", "student.training_file")
        assert "target_lang" in error["message"]
    made = ask("student", student=student)["student"]
    assert made == {"training_file": public, "num_layers": None, "n_epochs": 3, "columns": columns, **told}


@pytest.mark.every_database
def test_a_stale_fence_writes_nothing_and_attempts_are_counted(
    ask: Any, database: Database, settings: Settings
) -> None:
    export_id = ask("fp16")["id"]
    settings = settings.model_copy(update={"max_attempts": 2})

    def claim() -> Any:
        with database.writing() as session:
            return lifecycle.claim(session, export_id, "test", 30.0)

    first = claim()
    assert claim() is None
    with database.writing() as session:
        session.execute(update(Export).values(lease_expires_at=time.time() - 1))
        assert lifecycle.sweep(session, settings) == [export_id]
    second = claim()
    assert second.fence == first.fence + 1
    for write in (
        lambda session: lifecycle.heartbeat(session, export_id, first.fence, 30.0),
        lambda session: lifecycle.fail(session, export_id, first.fence, "exporter_error"),
        lambda session: lifecycle.abandon(session, export_id, first.fence, settings, "exporter_error"),
    ):
        with pytest.raises(LeaseLost), database.writing() as session:
            write(session)
    with database.writing() as session:
        assert not lifecycle.abandon(session, export_id, second.fence, settings, "Mrs Patient")
    with database.reading() as session:
        export = session.get_one(Export, export_id)
    assert (export.status, export.attempts) == ("failed", 2)
    assert export.error == {"code": "exporter_error", "message": lifecycle.FAILURES["exporter_error"]}


@pytest.mark.every_database
def test_one_format_has_one_export_at_a_time(ask: Any, database: Database, model: str) -> None:
    """The database itself holds it, whatever two requests see of each other."""
    from sqlalchemy.exc import IntegrityError

    export_id = ask("fp16")["id"]
    with database.reading() as session:
        row = session.get_one(Export, export_id)
        twin = {column.name: getattr(row, column.name) for column in Export.__table__.columns} | {"id": "export-twin"}
    with pytest.raises(IntegrityError), database.writing() as session:
        session.add(Export(**twin))
    with database.writing() as session:
        models.note_export(session, model, "fp16", FIGURES)
        session.get_one(Export, export_id).deleted_at = time.time()
        session.flush()
        session.add(Export(**twin))


def test_a_job_names_what_is_to_be_made_of_its_model(
    client: TestClient, app: FastAPI, database: Database, settings: Settings
) -> None:
    file = upload(client, database, settings, app)
    body = {
        "model": "all-MiniLM-L6-v2",
        "training_file": file,
        "task": {"columns": {"text": "review", "label": "mood"}, "labels": ["0", "1"]},
        "adaptation": {"type": "head"},
        "evaluation": "none",
    }

    def submit(**export: Any) -> Any:
        return client.post("/v1/fine_tuning/jobs", json={**body, "export": export}).json()

    job = submit(formats=["onnx", "fp16"])
    assert job["export"] == {"formats": ["onnx", "fp16"]}, job
    assert job["exports"] == []
    for formats, more, code, param in (
        (["adapter"], {}, "format_not_supported", "export.formats"),
        (["onnx", "onnx"], {}, "invalid_request", "export.formats"),
        (["tflite"], {}, "invalid_request", "export.formats.0"),
        (["student"], {}, "student_file_required", "export.student"),
        (["student"], {"student": {"training_file": file}}, "file_not_public", "export.student.training_file"),
    ):
        error = submit(formats=formats, **more)["error"]
        assert (error["code"], error["param"]) == (code, param), error
