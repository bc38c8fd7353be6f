"""What a worker does with whatever its exporter says or does: one end, an exact list of files, the model unharmed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app.db.session import Database
from app.exports.tables import Export
from app.jobs.tables import Job
from tests.worker.test_supervisor import SUCCESS
from tests.worker.test_trainer_process import OPENING
from worker import exports
from worker.exporter.spec import ExportSpec
from worker.trainer_process import TrainerProcess
from worker.workplace import Workplace

TOOLS = (
    OPENING
    + """
folder = order["folder"]
spec = json.load(open(os.path.join(folder, "export.json")))
def write(name, text):
    path = os.path.join(folder, "results", name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "w").write(text)
def results(**metrics):
    for name in ("README.md", "config.json", "export.json", "model.safetensors"):
        write("export/" + name, name)
    write("metrics.json", json.dumps({"speedup": 2.0, "compared_on": "synthetic inputs", **metrics}))
def finish():
    say(type="finished", executed={}, train_seconds=1.0)
"""
)
MADE = "results(); finish()"


@pytest.fixture
def model(work: Callable[..., Any], job: Callable[[], Job]) -> str:
    """What a job made, as its scripted trainer left it."""
    work(SUCCESS)
    assert job().fine_tuned_model is not None
    return str(job().fine_tuned_model)


@pytest.fixture
def export(client: TestClient, model: str) -> Callable[[], Any]:
    """The model's fp16 export, as it stands."""
    made = client.post(f"/v1/models/{model}/exports", json={"format": "fp16"}).json()

    def read() -> Any:
        return client.get(f"/v1/models/{model}/exports/{made['id']}").json()

    return read


@pytest.fixture
def attempt(workplace: Workplace, export: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """One delivery of the export's hint to a worker whose exporter is this script."""

    def deliver(script: str) -> None:
        monkeypatch.setattr(exports, "PROGRAM", (sys.executable, "-c", TOOLS + script))
        exports.run_export(workplace, export()["id"])

    return deliver


def test_what_was_made_is_published_once_and_nothing_else(
    attempt: Any, export: Any, client: TestClient, model: str, stored: Any
) -> None:
    attempt(
        "results(loss=0.1, speedup='Mrs Patient');"
        "write('export/optimizer.pt', 'SECRET');"
        "os.symlink('/etc/hostname', os.path.join(folder, 'results/export/vocab.txt')); finish()"
    )
    assert export()["status"] == "succeeded"
    assert export()["metrics"] == {"compared_on": "synthetic inputs"}
    url = f"/v1/models/{model}/exports/{export()['id']}"
    names = [file["path"] for file in client.get(f"{url}/files").json()["data"]]
    assert names == ["README.md", "config.json", "export.json", "model.safetensors", "privacy_report.json"]
    assert (
        client.get(f"{url}/files/privacy_report.json").json()
        == client.get(f"/v1/models/{model}").json()["privacy_report"]
    )
    assert stored("optimizer") == []
    attempt("say(type='failed', code='exporter_error')")  # the hint came twice: nothing is claimed
    assert export()["status"] == "succeeded"


@pytest.mark.parametrize(
    ("graphs", "status"),
    [
        (("model",), "succeeded"),
        (("encoder_model", "decoder_model", "decoder_with_past_model"), "succeeded"),
        (("encoder_model",), "failed"),
        (("encoder_model", "decoder_model"), "failed"),
        ((), "failed"),
    ],
)
def test_a_graph_is_whole_or_all_of_three_are_there(
    workplace: Workplace,
    client: TestClient,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    graphs: tuple[str, ...],
    status: str,
) -> None:
    made = client.post(f"/v1/models/{model}/exports", json={"format": "onnx"}).json()
    written = "".join(f"write('export/{name}.onnx', 'x');" for name in graphs)
    monkeypatch.setattr(exports, "PROGRAM", (sys.executable, "-c", f"{TOOLS}results();{written}finish()"))
    exports.run_export(workplace, made["id"])
    url = f"/v1/models/{model}/exports/{made['id']}"
    assert client.get(url).json()["status"] == status
    if status == "succeeded":
        names = [file["path"] for file in client.get(f"{url}/files").json()["data"]]
        assert {name for name in names if name.endswith(".onnx")} == {f"{name}.onnx" for name in graphs}
        assert "model.safetensors" not in names


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("say(type='failed', code='export_check_failed')", "export_check_failed"),
        ("say(type='failed', code='Mrs Patient')", "exporter_error"),
        ("finish()", "exporter_error"),  # there are no results
        ("write('metrics.json', '{}'); write('export/README.md', ''); finish()", "exporter_error"),
        ("results(); write('export/modeling_group_norm.py', 'import os'); finish()", "exporter_error"),  # not our code
        ("os.kill(os.getpid(), 9)", "exporter_error"),
    ],
)
def test_a_failure_ends_the_export_and_never_its_model(
    attempt: Any, export: Any, client: TestClient, model: str, script: str, code: str, stored: Any
) -> None:
    before = stored(f"{model}")
    for _ in range(3):
        attempt(script)
    assert (export()["status"], export()["error"]["code"]) == ("failed", code)
    assert "Patient" not in json.dumps(export())
    assert client.get(f"/v1/models/{model}").status_code == 200
    assert stored(f"{model}") == before
    assert stored("/exports/") == []


def test_a_crash_is_tried_again(attempt: Any, export: Any) -> None:
    attempt("os.kill(os.getpid(), 9)")
    assert export()["status"] == "queued"
    attempt(MADE)
    assert export()["status"] == "succeeded"


def test_a_worker_that_shuts_down_gives_the_export_back_uncounted(
    attempt: Any, export: Any, workplace: Workplace, monkeypatch: pytest.MonkeyPatch, database: Database
) -> None:
    begin = TrainerProcess.begin

    def ending(trainer: TrainerProcess, key: bytes) -> None:
        begin(trainer, key)
        workplace.shutting_down.set()

    monkeypatch.setattr(TrainerProcess, "begin", ending)
    attempt("time.sleep(60)")
    workplace.shutting_down.clear()
    with database.reading() as session:
        row = session.get_one(Export, export()["id"])
    assert (row.status, row.attempts) == ("queued", 0)


def test_an_export_that_was_deleted_meanwhile_leaves_nothing(
    attempt: Any, export: Any, client: TestClient, model: str, monkeypatch: pytest.MonkeyPatch, stored: Any
) -> None:
    identifier, store = export()["id"], exports.results.store

    def deleted_first(*arguments: Any) -> Any:
        fields = store(*arguments)
        assert client.delete(f"/v1/models/{model}/exports/{identifier}").status_code == 200
        return fields

    monkeypatch.setattr(exports.results, "store", deleted_first)
    attempt(MADE)
    assert stored("/exports/") == []
    assert (
        "exports" not in client.get(f"/v1/models/{model}").json()["metrics"]
        or not (client.get(f"/v1/models/{model}").json()["metrics"]["exports"])
    )


def test_an_attempt_that_lost_its_lease_publishes_nothing(
    attempt: Any, export: Any, database: Database, monkeypatch: pytest.MonkeyPatch, stored: Any
) -> None:
    store = exports.results.store

    def stolen_first(*arguments: Any) -> Any:
        fields = store(*arguments)
        with database.writing() as session:
            session.execute(update(Export).values(fence=Export.fence + 1))
        return fields

    monkeypatch.setattr(exports.results, "store", stolen_first)
    attempt(MADE)
    assert export()["status"] == "running"  # the other's
    assert stored("/exports/") == []


def test_an_attempt_that_wakes_up_late_leaves_what_another_published(
    attempt: Any, export: Any, client: TestClient, model: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken over before it laid out its folder, and does not know yet."""
    lay_out = exports._lay_out

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(exports, "_lay_out", lay_out)
        with database.writing() as session:
            session.execute(update(Export).values(status="queued"))
        attempt(MADE)
        assert export()["status"] == "succeeded"
        lay_out(*arguments)

    monkeypatch.setattr(exports, "_lay_out", overtaken)
    attempt(MADE)
    assert client.get(f"/v1/models/{model}/exports/{export()['id']}/files/config.json").content == b"config.json"


def test_the_exporter_is_given_released_files_and_no_key(
    attempt: Any, export: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    begin = TrainerProcess.begin

    def look(trainer: TrainerProcess, key: bytes) -> None:
        path = trainer.folder.path
        seen.update(
            key=key, spec=ExportSpec.read(path), names={file.name for file in path.rglob("*") if file.is_file()}
        )
        begin(trainer, key)

    monkeypatch.setattr(TrainerProcess, "begin", look)
    attempt(MADE)
    assert seen["key"] == b""
    assert seen["spec"].model_id == model
    assert seen["names"] == {
        ".lock",
        "README.md",
        "config.json",
        "export.json",
        "metrics.json",
        "model.safetensors",
        "privacy_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer.log",
    }
