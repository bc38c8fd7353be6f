"""Probabilities that hold: two private jobs on the same rows, just below and just above where a temperature follows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from app.privacy.report_check import check_report
from tests.running import Running, wait_for_job
from tests.trainer.jobs import LABELS, make_base, rows

NUM_ROWS = 600


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_base(root / "tiny-bert")
    return root


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.client() as opened:
        yield opened


def _upload(client: openai.OpenAI, path: Path, data: list[tuple[str, str]], **body: Any) -> str:
    """Rows of which every fifth's label is wrong, by chance: nobody can be surer than that."""
    wrong = torch.rand(len(data), generator=torch.Generator().manual_seed(len(data))) < 0.2
    lines = [
        json.dumps({"text": text, "label": LABELS[(label == LABELS[1]) ^ bool(flip)]})
        for (text, label), flip in zip(data, wrong, strict=True)
    ]
    path.write_text("\n".join(lines))
    uploaded = client.files.create(file=path, purpose="fine-tune", extra_body=body or None)
    return str(client.files.wait_for_processing(uploaded.id, poll_interval=0.1).id)


def test_the_temperature_mends_a_loss_that_was_worse_than_a_coins(client: openai.OpenAI, tmp_path: Path) -> None:
    training = _upload(client, tmp_path / "training.jsonl", rows(NUM_ROWS))
    validation = _upload(client, tmp_path / "validation.jsonl", rows(1400)[1000:], public="true")
    made = []
    for epsilon in (9_900 / NUM_ROWS, 10_000 / NUM_ROWS):
        job = client.fine_tuning.jobs.create(
            model="tiny-bert",
            training_file=training,
            validation_file=validation,
            hyperparameters={"n_epochs": 10},
            extra_body={
                "adaptation": {"type": "attentive_lora", "rank": 2},
                "privacy": {"target_epsilon": epsilon, "target_delta": 1e-5},
            },
        )
        job = wait_for_job(client, job.id)
        assert job.status == "succeeded", job.error
        model = client.models.retrieve(job.fine_tuned_model).to_dict()
        report = client.get(f"/models/{job.fine_tuned_model}/privacy_report", cast_to=object)
        made.append((job.to_dict(), model["metrics"], report))
    (bare, before, _), (scaled, after, report) = made

    # The wire names what was asked for, and tells of its phase.
    for job in (bare, scaled):
        assert job["adaptation"] == {"type": "attentive_lora", "num_layers": 1, "rank": 2, "alpha": 32.0}
        assert job["hyperparameters"]["n_epochs"] == 10
        assert (job["optimizer"]["type"], job["privacy"]["num_steps"]) == ("adamw", 20)
        assert (job["privacy"]["sample_rate"], job["privacy"]["clipping"]) == (0.5, "automatic")
    assert [part["name"] for part in bare["privacy"]["parts"]] == ["centring", "head", "main"]
    assert [part["name"] for part in scaled["privacy"]["parts"]] == ["centring", "head", "main", "temperature"]
    assert scaled["privacy"]["noise_multiplier"] == scaled["privacy"]["parts"][2]["noise_multiplier"]
    assert scaled["progress"]["executed"] == {"centring": 1, "head": 100, "main": 20, "temperature": 30}
    assert [check.name for check in check_report(report) if not check.holds] == []

    assert min(before["accuracy"], after["accuracy"]) > 0.7
    assert before["loss"] > math.log(2)
    assert after["loss"] < 0.56  # the best there is: 0.50
