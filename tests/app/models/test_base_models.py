"""Bases over HTTP: listed in pages, recommended for a question, taken by jobs, held while a job needs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.catalog.adaptations import ADAPTATIONS
from app.catalog.bases import BASES
from app.catalog.memory import trained_parameters, training_bytes
from app.catalog.recommendation import REASONS, recommend
from app.db.session import Database
from app.jobs.tables import Job
from app.models.tables import Model, ModelUse
from app.settings import Settings
from tests.app.models.folders import CONFIG, make_folder

MINILM = BASES["all-MiniLM-L6-v2"]
ROWS = b"text,label\n" + b"".join(b"words %d,%d\n" % (number, number % 2) for number in range(100))

REPORT: dict[str, Any] = {
    "job": "ftjob-1",
    "base_model": MINILM.id,
    "mechanism": "dp_sgd",
    "guarantee": {"privacy_unit": "record", "epsilon": 2.5, "delta": 1e-6, "accountant": "PLD"},
    "budgets": [{"privacy_budget": "pb-1", "datasets": ["training"], "dp_event": {"type": "no_op"}}],
}


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    models = tmp_path / "models"
    make_folder(models / "org" / "small", modules__json=[])
    make_folder(models / "tiny", config__json=CONFIG)
    make_folder(models / "broken", model__safetensors=None)
    return settings.model_copy(update={"models_dir": models})


@pytest.fixture
def trained(publish: Callable[..., str], database: Database) -> str:
    """A model that a job of this project made."""
    model_id = publish()
    with database.writing() as session:
        model = session.get_one(Model, model_id)
        model.privacy_report, model.base_facts = REPORT, {**MINILM.to_dict(), "labels": ["a", "b"]}
    return model_id


@pytest.fixture
def file_id(client: TestClient) -> str:
    answer = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.csv", ROWS)})
    return answer.json()["id"]


def test_the_list_has_pages(client: TestClient) -> None:
    whole = client.get("/v1/base_models").json()
    ids = [base["id"] for base in whole["data"]]
    assert {"all-MiniLM-L6-v2", "org/small", "tiny"} <= set(ids)
    assert "broken" not in ids
    assert whole["has_more"] is False
    paged: list[str] = []
    while True:
        after = f"&after={paged[-1]}" if paged else ""
        page = client.get(f"/v1/base_models?limit=1{after}").json()
        paged += [base["id"] for base in page["data"]]
        if not page["has_more"]:
            break
    assert paged == ids
    wrong = client.get("/v1/base_models?after=none")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_after")


def test_one_of_them(client: TestClient, tmp_path: Path) -> None:
    base = client.get("/v1/base_models/org%2Fsmall").json()
    assert (base["object"], base["family"], base["licence"], base["source"]) == ("base_model", "bert", "mit", "folder")
    assert len(base["sha256"]) == 64
    assert set(base["training_memory_bytes"]) == set(ADAPTATIONS)
    assert base["recommendation"] is None
    assert str(tmp_path) not in client.get("/v1/base_models").text
    assert client.get("/v1/base_models/nothing").json()["error"]["code"] == "model_not_found"
    broken = client.get("/v1/base_models/broken").json()["error"]
    assert (broken["code"], broken["reason"]) == ("base_model_refused", "no_safetensors")


def test_a_recommendation_is_an_order_with_reasons(client: TestClient) -> None:
    answer = client.get("/v1/base_models?task=text_classification&num_units=5000&epsilon=3&device=cpu").json()
    found = [(base["id"], base["recommendation"]) for base in answer["data"]]
    assert found[0][0] == "all-MiniLM-L6-v2"  # the larger of the sentence encoders
    assert [entry["rank"] for _, entry in found] == list(range(1, len(found) + 1))
    assert found[0][1]["reason"] == "sentence_encoder"
    assert found[0][1]["adaptation"] == "attentive_head"
    numbers = client.get("/v1/base_models?task=text_regression&num_units=5000&epsilon=3&device=cpu").json()["data"]
    assert numbers[0]["recommendation"]["adaptation"] == "attentive_head"
    assert {entry["reason"] for _, entry in found} <= set(REASONS)
    url = "/v1/base_models?task=text_classification&num_units=7000&epsilon=8&device=cpu"
    deeper = client.get(url).json()["data"][0]["recommendation"]
    assert (deeper["adaptation"], deeper["reason"], deeper["rank"]) == ("attentive_lora", "sentence_encoder", 1)
    assert 600 < deeper["seconds"] < 7200
    pairs = client.get(f"{url}&text_pair=true").json()["data"][0]["recommendation"]
    assert (pairs["adaptation"], pairs["reason"], pairs["rank"]) == ("attentive_head", "sentence_encoder", 1)
    one, two = (client.get(f"{url.replace('7000', '5000').replace('=8', '=3')}{more}") for more in ("", "&text_pair=1"))
    times = [answer.json()["data"][0]["recommendation"]["seconds"] for answer in (one, two)]
    assert times[1] == pytest.approx(2 * times[0], rel=0.05)  # two texts to read
    second = client.get(f"/v1/base_models?task=text_classification&limit=1&after={found[0][0]}").json()
    assert [base["id"] for base in second["data"]] == [found[1][0]]
    for query, code in (
        ("task=nothing", "task_not_supported"),
        ("num_units=10", "invalid_request"),
        ("text_pair=true", "invalid_request"),
        ("task=summarization&text_pair=true", "invalid_request"),
    ):
        wrong = client.get(f"/v1/base_models?{query}")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, code)
    for query in ("task=text_classification&epsilon=0", "task=text_classification&device=tpu"):
        assert client.get(f"/v1/base_models?{query}").status_code == 400


def test_larger_is_better_until_it_is_too_slow() -> None:
    plain = dataclasses.replace(MINILM, sentence_encoder=False)
    sizes = {"small": 10**7, "large": 3 * 10**8, "huge": 10**11}
    bases = [dataclasses.replace(plain, id=name, parameters=size) for name, size in sizes.items()]
    found = recommend(bases, "text_classification", 5000, 3.0, "cpu")
    reasons = [(each.base.id, each.reason) for each in found]
    assert reasons == [("large", "largest_in_time"), ("small", "smaller"), ("huge", "too_slow")]
    on_gpu = recommend(bases, "text_classification", 5000, 3.0, "cuda")
    assert [each.base.id for each in on_gpu] == ["huge", "large", "small"]
    encoder = dataclasses.replace(plain, id="encoder", parameters=10**6, sentence_encoder=True)
    assert recommend([*bases, encoder], "text_classification", 5000, 3.0, "cpu")[0].base.id == "encoder"
    # With enough people whole layers learn, and frozen features count no more.
    assert recommend([*bases[:2], encoder], "text_classification", 10**5, 8.0, "cuda")[0].base.id == "large"


def test_what_is_told_of_auto_is_what_auto_picks() -> None:
    """A net of convolutions has no matrices for LoRA."""
    found = recommend(BASES.values(), "image_classification", 30_000, 3.0, "cpu")
    assert [(each.base.id, each.adaptation) for each in found] == [("efficientnet-lite0", "last_layers")]


def test_memory_follows_the_parameters() -> None:
    need = {name: training_bytes(MINILM, adaptation(), 4096) for name, adaptation in ADAPTATIONS.items()}
    assert need["head"] < need["last_layers"] < need["full"]
    assert need["bitfit"] < need["full"]
    assert trained_parameters(MINILM, ADAPTATIONS["full"]()) == MINILM.parameters
    assert trained_parameters(MINILM, ADAPTATIONS["last_layers"](num_layers=2)) == 2 * MINILM.layer_parameters
    assert trained_parameters(MINILM, ADAPTATIONS["lora"](rank=8)) == 6 * 2 * 2 * 8 * 384
    assert trained_parameters(MINILM, ADAPTATIONS["attentive_lora"](rank=8)) == 4 * 8 * 9 * 384 + 384
    assert need["head"] < need["attentive_lora"] < need["lora"] < need["full"]  # four blocks of six
    assert training_bytes(MINILM, ADAPTATIONS["full"](), 8192) > need["full"]


def test_a_job_takes_a_base_of_the_folder(client: TestClient, file_id: str, database: Database) -> None:
    job = client.post("/v1/fine_tuning/jobs", json={"model": "org/small", "training_file": file_id}).json()
    assert job["model"] == "org/small", job
    with database.reading() as session:
        assert session.get_one(Job, job["id"]).model == "org/small"
    pinned = "org/small@" + "0" * 40
    refusals = {"broken": "base_model_refused", "none": "model_not_found", pinned: "hub_not_available"}
    for model, code in refusals.items():
        answer = client.post("/v1/fine_tuning/jobs", json={"model": model, "training_file": file_id})
        assert answer.json()["error"]["code"] == code


def test_a_trained_model_is_a_base_for_its_project_alone(
    client: TestClient, trained: str, file_id: str, make_key: Callable[..., str], publish: Callable[..., str]
) -> None:
    base = client.get(f"/v1/base_models/{trained}").json()
    assert (base["id"], base["source"]) == (trained, "fine_tuned")
    (ancestor,) = base["lineage"]
    assert (ancestor["model"], ancestor["job"], ancestor["epsilon"]) == (trained, "ftjob-1", 2.5)
    assert trained not in client.get("/v1/base_models").text
    other = {"authorization": f"Bearer {make_key('admin', project='other')}"}
    rows = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("r.csv", ROWS)}, headers=other)
    body = {"model": trained, "training_file": rows.json()["id"]}
    foreign = client.post("/v1/fine_tuning/jobs", json=body, headers=other)
    missing = client.post("/v1/fine_tuning/jobs", json={**body, "model": "ft-none"}, headers=other)
    assert (foreign.status_code, foreign.json()) == (404, missing.json())
    adapter = client.post("/v1/fine_tuning/jobs", json={"model": publish(), "training_file": file_id})
    assert (adapter.status_code, adapter.json()["error"]["code"]) == (400, "model_not_a_base")


def test_a_base_is_kept_until_the_job_has_ended(
    client: TestClient, trained: str, file_id: str, database: Database
) -> None:
    job = client.post("/v1/fine_tuning/jobs", json={"model": trained, "training_file": file_id}).json()
    refused = client.delete(f"/v1/models/{trained}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_in_use")
    assert client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").status_code == 200
    with database.reading() as session:
        assert session.scalars(select(ModelUse)).all() == []
    assert client.delete(f"/v1/models/{trained}").json()["deleted"] is True
    gone = client.post("/v1/fine_tuning/jobs", json={"model": trained, "training_file": file_id})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
