"""A real text and a real, tiny Llama, the speaker as privacy unit: skipped where the data does not lie beside."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.privacy.report_check import check_report
from tests.running import REPOSITORY, Running, wait_for_job

SHARED = REPOSITORY.parent / "shared"
SPEECHES, MODELS = SHARED / "data/tinyshakespeare/input.txt", SHARED / "models"

pytestmark = pytest.mark.skipif(
    not (SPEECHES.exists() and (MODELS / "stories260k/model.safetensors").exists()),
    reason="needs tinyshakespeare (char-rnn's input.txt) and the model stories260k in ../shared",
)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service that offers the tiny Llama."""
    settings = {"PRIVTUNE_BUDGET_EPSILON": "20", "PRIVTUNE_BUDGET_DELTA": "1e-3"}
    with Running(tmp_path_factory.mktemp("speaking"), PRIVTUNE_MODELS_DIR=str(MODELS), **settings) as service:
        yield service


def speeches() -> list[dict[str, str]]:
    """speaker, text; in the play's order."""
    blocks = (block.partition(":\n") for block in SPEECHES.read_text(encoding="utf-8").split("\n\n"))
    return [{"speaker": who.strip(), "text": text.strip()} for who, colon, text in blocks if colon and text.strip()]


def test_a_model_is_private_for_each_speaker(speaking: Running, tmp_path: Path) -> None:
    rows = speeches()[:1500]
    speakers = Counter(row["speaker"] for row in rows)
    assert max(speakers.values()) > 50  # one of them says far more than a step ever takes of him
    file = tmp_path / "speeches.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with speaking.client() as client:
        unit: Any = {"privacy_unit": {"column": "speaker"}}
        uploaded = client.files.create(file=file, purpose="fine-tune", extra_body=unit)
        assert client.files.wait_for_processing(uploaded.id, max_wait_seconds=120).status == "processed"
        job = client.fine_tuning.jobs.create(
            model="stories260k",
            training_file=uploaded.id,
            hyperparameters={"n_epochs": 2, "batch_size": 16},
            extra_body={
                "task": {"type": "language_modeling", "max_length": 64},
                "adaptation": {"type": "full"},
                "privacy": {"target_epsilon": 8.0, "target_delta": 1e-3, "max_records_per_unit": 2},
                "evaluation": {"split": 0.2, "epsilon_share": 0.3},
            },
        )
        job = wait_for_job(client, job.id, 600)
        assert job.status == "succeeded", job.error
        headers = {"authorization": f"Bearer {client.api_key}"}
        url = f"{speaking.url}/v1/models/{job.fine_tuned_model}"
        model = httpx.get(url, headers=headers, timeout=60).json()
        bundle = tmp_path / "bundle"
        bundle.mkdir()
        for listed in httpx.get(f"{url}/files", headers=headers, timeout=60).json()["data"]:
            answer = httpx.get(f"{url}/files/{listed['path']}", headers=headers, timeout=60)
            (bundle / listed["path"]).write_bytes(answer.content)
    privacy, metrics, report = job.model_extra["privacy"], model["metrics"], model["privacy_report"]
    assert privacy["privacy_unit"] == {"column": "speaker"}
    assert privacy["num_units"] + metrics["num_units"] == len(speakers)
    assert metrics["averaged_over"] == "units"
    assert metrics["not_released"] == {"loss": "noise", "perplexity": "noise"}  # of so few speakers: some nats
    low, high = metrics["token_accuracy_interval_95"]
    assert low <= metrics["token_accuracy"] <= high
    assert report["guarantee"]["privacy_unit"] == {"column": "speaker"}
    assert [check.name for check in check_report(report) if not check.holds] == []
    tokenizer, trained = AutoTokenizer.from_pretrained(bundle), AutoModelForCausalLM.from_pretrained(bundle)
    said = trained.generate(**tokenizer("My lord,", return_tensors="pt"), max_new_tokens=8)
    assert said.shape[1] > 3
