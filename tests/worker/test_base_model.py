"""What a trainer gets of its base: the files of the plan, and a job whose base has changed or gone is not trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db.session import Database
from app.jobs.tables import Job
from app.models.tables import Model
from app.settings import Settings
from app.storage import open_storage
from tests.app.models.folders import CONFIG, SHAPES, make_folder, safetensors
from tests.worker.conftest import Scripted
from worker import chores, job_folder, supervisor
from worker.workplace import Workplace

#: A trainer that tells what it was given.
TELLS = """
started()
base = spec["base"]
names = sorted(n for n in os.listdir(base["path"]) if os.path.isfile(os.path.join(base["path"], n)))
small = [n for n in names if os.path.getsize(os.path.join(base["path"], n)) < 10000]
told = {n: open(os.path.join(base["path"], n), "rb").read().hex() for n in small}
links = [n for n in names if os.path.islink(os.path.join(base["path"], n))]
results()
write("model/README.md", json.dumps({"base": base, "files": told, "links": links}))
finish()
"""


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"models_dir": tmp_path / "models"})


@pytest.fixture
def folder(settings: Settings) -> Path:
    assert settings.models_dir is not None
    return make_folder(settings.models_dir / "mine", pytorch_model__bin=b"pickle", code__py="print()")


@pytest.fixture
def train(client: TestClient, workplace: Workplace, database: Database) -> Callable[..., Job]:
    """Submits a job from `model` and delivers its hint; between: what happens meanwhile."""
    rows = "".join(f"text number {n},{'good' if n % 3 else 'bad'}\n" for n in range(60))
    upload = {"file": ("rows.csv", f"text,label\n{rows}".encode())}
    file_id = client.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).json()["id"]
    chores.process_file(workplace, file_id)

    def run(model: str, between: Callable[[], object] = lambda: None) -> Job:
        body = {"model": model, "training_file": file_id, "privacy": {"target_epsilon": 1.0}, "evaluation": "none"}
        answer = client.post("/v1/fine_tuning/jobs", json={**body, "adaptation": {"type": "head"}})
        assert answer.status_code == 200, answer.text
        between()
        spares = Scripted(job_folder.folders_root(workplace.settings), (TELLS,))
        supervisor.run_job(workplace, spares, answer.json()["id"])  # type: ignore[arg-type]
        with database.reading() as session:
            return session.get_one(Job, answer.json()["id"])

    return run


def told(client: TestClient, job: Job) -> dict[str, Any]:
    assert job.status == "succeeded", job.error
    return client.get(f"/v1/models/{job.fine_tuned_model}/files/README.md").json()


def test_a_folder_is_rewritten_and_its_weights_are_linked(
    client: TestClient, train: Callable[..., Job], folder: Path
) -> None:
    seen = told(client, train("mine"))
    assert seen["base"]["licence"] == "mit"
    assert set(seen["files"]) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert seen["links"] == ["model.safetensors"]
    assert bytes.fromhex(seen["files"]["model.safetensors"]) == (folder / "model.safetensors").read_bytes()
    assert "_name_or_path" not in json.loads(bytes.fromhex(seen["files"]["config.json"]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", safetensors(SHAPES, "F64", 8)),
        ("config.json", json.dumps({**CONFIG, "num_attention_heads": 4}).encode()),
        ("tokenizer.json", b"{}"),
        ("config.json", json.dumps({**CONFIG, "auto_map": {"AutoModel": "x.Y"}}).encode()),
        ("model.safetensors", None),
    ],
)
def test_a_folder_that_changed_since_the_submit_is_not_trained(
    train: Callable[..., Job], folder: Path, name: str, content: bytes | None
) -> None:
    def change() -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    job = train("mine", change)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "base_model_invalid"


def test_a_trained_model_is_fetched_from_the_store_and_its_lineage_reported(
    client: TestClient, train: Callable[..., Job], database: Database, settings: Settings
) -> None:
    first = train("all-MiniLM-L6-v2")
    base = str(first.fine_tuned_model)
    with database.writing() as session:  # a scripted trainer leaves no real weights: say that it had
        session.get_one(Model, base).base_facts = dict((first.resolved or {})["base"])
    second = train(base)
    seen = told(client, second)
    assert set(seen["files"]) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert bytes.fromhex(seen["files"]["model.safetensors"]) == b"model.safetensors"
    assert str(second.fine_tuned_model).startswith("ft-all-MiniLM-L6-v2-")
    report = client.get(f"/v1/models/{second.fine_tuned_model}/privacy_report").json()
    (ancestor,) = report["lineage"]["models"]
    assert (ancestor["model"], ancestor["job"], ancestor["base_model"]) == (base, first.id, "all-MiniLM-L6-v2")
    (composed,) = report["lineage"]["composed"]
    assert composed["jobs"] == [second.id, first.id]
    assert ancestor["epsilon"] < composed["epsilon"]
    assert composed["rho"] == pytest.approx(report["budgets"][0]["so_far"]["rho"])
    with database.writing() as session:
        session.get_one(Model, second.fine_tuned_model).base_facts = dict((first.resolved or {})["base"])
    third = train(str(second.fine_tuned_model))
    report = client.get(f"/v1/models/{third.fine_tuned_model}/privacy_report").json()
    assert [entry["job"] for entry in report["lineage"]["models"]] == [second.id, first.id]
    page = client.get(f"/v1/models/{third.fine_tuned_model}/privacy_report", headers={"accept": "text/html"}).text
    assert "Where the base model comes from" in page

    def damage() -> None:
        root = open_storage(settings.storage).local_path("x")
        assert root is not None
        with database.reading() as session:
            prefix = session.get_one(Model, base).storage_prefix
        (root.parent / prefix / "config.json").write_text("another")

    job = train(base, damage)
    assert job.error is not None
    assert job.error["code"] == "base_model_invalid"
