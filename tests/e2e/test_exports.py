"""Exports of a real model by a running service: asked for with the job and afterwards, downloaded, loaded by hand."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.running import BASE_MODEL, Running, until, wait_for_job, write_snippets

# Of peft, on a model of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TEXTS = ["a wonderful, moving film", "dull and far too long", "it works", "what a waste of time and talent"]


@pytest.fixture(scope="module")
def public(client: openai.OpenAI, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """60 rows declared public."""
    path = write_snippets(tmp_path_factory.mktemp("public") / "public.csv", 60, start=7)
    file = client.files.create(file=path, purpose="fine-tune", extra_body={"public": "true"})
    return client.files.wait_for_processing(file.id, poll_interval=0.1, max_wait_seconds=60)


@pytest.fixture(scope="module")
def job(client: openai.OpenAI, dataset: Any) -> Any:
    """A private LoRA job that asked for an adapter."""
    return _adapted(client, dataset, "lora")


def _adapted(client: openai.OpenAI, dataset: Any, adaptation: str) -> Any:
    made = client.fine_tuning.jobs.create(
        model=BASE_MODEL,
        training_file=dataset.id,
        hyperparameters={"n_epochs": 1, "batch_size": 100},
        extra_body={
            "task": {"type": "text_classification", "labels": ["negative", "positive"], "max_length": 32},
            "adaptation": {"type": adaptation, "rank": 4},
            "privacy": {"target_epsilon": 8.0, "target_delta": 1e-5},
            "evaluation": "none",
            "export": {"formats": ["adapter"]},
        },
    )
    ended = wait_for_job(client, made.id, 250)
    assert ended.status == "succeeded", ended.error
    return ended


def unpacked(http: httpx.Client, url: str, folder: Path) -> Path:
    """What an archive holds."""
    tar = http.get(f"{url}/download").raise_for_status()
    with tarfile.open(fileobj=io.BytesIO(tar.content)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "model"


def finished(http: httpx.Client, job: Any, format_: str, **fields: Any) -> Any:
    """The model's export of that format, asked for, once it has succeeded."""
    url = f"/models/{job.fine_tuned_model}/exports"
    made = http.post(url, json={"format": format_, **fields}).raise_for_status().json()

    def ended() -> Any:
        now = http.get(f"{url}/{made['id']}").raise_for_status().json()
        return now if now["status"] in ("succeeded", "failed") else None

    done = until(ended, 250, every=0.5)
    assert done["status"] == "succeeded", done["error"]
    return done


@pytest.mark.parametrize("adaptation", ["lora", "attentive_lora"])
def test_an_adapter_follows_the_job_and_answers_as_its_model_does(
    request: pytest.FixtureRequest,
    client: openai.OpenAI,
    http: httpx.Client,
    dataset: Any,
    tmp_path: Path,
    service: Running,
    adaptation: str,
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from app.catalog.bases import BASES
    from app.models.catalog import base_path

    job = request.getfixturevalue("job") if adaptation == "lora" else _adapted(client, dataset, adaptation)
    bundle = unpacked(http, f"/models/{job.fine_tuned_model}", tmp_path / "bundle")
    export = finished(http, job, "adapter")  # the one that the job asked for
    (entry,) = client.fine_tuning.jobs.retrieve(job.id).model_extra["exports"]
    assert entry == export
    model: Any = client.models.retrieve(job.fine_tuned_model)
    assert model.metrics["exports"] == {"adapter": export["metrics"]}
    assert export["metrics"]["compression"] > 8.0
    folder = unpacked(http, f"/models/{model.id}/exports/{export['id']}", tmp_path / "export")
    record = json.loads((folder / "export.json").read_text())
    assert (record["job"], record["privacy"]["epsilon"]) == (job.id, 0.0)
    assert json.loads((folder / "privacy_report.json").read_text()) == model.privacy_report
    listed = {file["path"]: file["sha256"] for file in http.get(f"/models/{model.id}/files").json()["data"]}
    assert record["made_from"]["sha256"] == listed["model.safetensors"]

    inputs = AutoTokenizer.from_pretrained(bundle)(TEXTS, padding=True, return_tensors="pt")
    config = AutoConfig.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(base_path(BASES[BASE_MODEL]), config=config)
    with torch.inference_mode():
        merged = AutoModelForSequenceClassification.from_pretrained(bundle).eval()(**inputs).logits
        adapted = PeftModel.from_pretrained(base, folder).eval()(**inputs).logits
    assert torch.allclose(adapted, merged, rtol=1e-3, atol=1e-4)
    assert not [pid for pid, command in service.tree().items() if "worker.exporter" in command], "it has ended"


def test_int8_is_a_quarter_and_loads_in_onnxruntime(http: httpx.Client, job: Any, tmp_path: Path) -> None:
    import onnxruntime
    from transformers import AutoTokenizer

    export = finished(http, job, "onnx_int8")
    assert export["metrics"]["compression"] > 3.0
    folder = unpacked(http, f"/models/{job.fine_tuned_model}/exports/{export['id']}", tmp_path)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="np")
    (logits,) = session.run(None, {entry.name: inputs[entry.name] for entry in session.get_inputs()})
    assert logits.shape == (len(TEXTS), 2)
    assert np.isfinite(logits).all()


def test_a_student_takes_public_files_only_and_spends_nothing(
    http: httpx.Client, job: Any, public: Any, dataset: Any
) -> None:
    def ledger() -> Any:
        budget = job.model_extra["privacy"]["privacy_budget"]
        return http.get(f"/privacy_budgets/{budget}/entries", params={"limit": 1}).raise_for_status().json()["data"]

    before, url = ledger(), f"/models/{job.fine_tuned_model}/exports"
    private = {"training_file": dataset.id}
    refused = http.post(url, json={"format": "student", "student": private})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "file_not_public")
    student = {"training_file": public.id, "num_layers": 2, "n_epochs": 1}
    made = http.post(url, json={"format": "student", "student": student}).raise_for_status().json()

    def ended() -> Any:
        now = http.get(f"{url}/{made['id']}").raise_for_status().json()
        return now if now["status"] in ("succeeded", "failed") else None

    # A model of 400 rows and one epoch answers nearly at random: whether two layers can follow it on six held-out texts
    # is chance (tests/exporter holds students to their model). That the check ran, and that it cost nothing, is not.
    done = until(ended, 250, every=0.5)
    assert done["status"] == "succeeded" or done["error"]["code"] == "student_check_failed"
    assert ledger() == before
