"""Persons as privacy units, from the upload to a verified report: one critic owns most of the rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from app.privacy.report_check import check_report
from tests.running import BASE_MODEL, Running, wait_for_job, write_snippets

ROWS, CRITICS, OF_ONE = 400, 101, 200


@pytest.fixture(scope="module")
def by_critic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first critic wrote every other row, a hundred others two each; mixed up."""
    folder = tmp_path_factory.mktemp("critics")
    with write_snippets(folder / "snippets.csv", ROWS).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with (folder / "critics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label", "critic"])
        writer.writeheader()
        for index, row in enumerate(rows):
            critic = 0 if index % 2 else 1 + (index // 2) % (CRITICS - 1)
            writer.writerow({**row, "critic": f"critic-{critic}"})
    return folder / "critics.csv"


def test_a_model_is_private_for_each_critic(service: Running, client: openai.OpenAI, by_critic: Path) -> None:
    uploaded: Any = client.files.create(
        file=by_critic, purpose="fine-tune", extra_body={"privacy_unit": {"column": "critic"}}
    )
    file: Any = client.files.wait_for_processing(uploaded.id, poll_interval=0.1, max_wait_seconds=60)
    assert (file.status, file.num_units, file.num_rows) == ("processed", CRITICS, None)
    assert file.privacy_unit == {"column": "critic"}

    headers = {"authorization": f"Bearer {client.api_key}"}
    with httpx.Client(base_url=f"{service.url}/v1", headers=headers, timeout=60) as http:
        counted = http.get(f"/files/{file.id}/units").json()
        assert (counted["num_rows"], counted["units_over_bound"]) == (ROWS, 1)
        assert counted["records_over_bound"] == OF_ONE - 8

        with pytest.raises(openai.BadRequestError) as refused:
            client.fine_tuning.jobs.create(
                model=BASE_MODEL,
                training_file=file.id,
                extra_body={"privacy": {"privacy_unit": {"column": None}}},
            )
        assert refused.value.code == "privacy_unit_mismatch"

        job = client.fine_tuning.jobs.create(
            model=BASE_MODEL,
            training_file=file.id,
            extra_body={
                "task": {"labels": ["negative", "positive"]},
                "privacy": {"target_epsilon": 8.0, "target_delta": 1e-5, "privacy_unit": {"column": "critic"}},
                "evaluation": {"split": 0.3},
            },
        )
        job = wait_for_job(client, job.id)
        assert job.status == "succeeded", job.error
        assert job.model_extra is not None
        privacy = job.model_extra["privacy"]
        assert (privacy["privacy_unit"], privacy["num_units"]) == ({"column": "critic"}, 71)
        model = http.get(f"/models/{job.fine_tuned_model}").json()
        metrics = model["metrics"]
        assert (metrics["num_units"], metrics["averaged_over"]) == (30, "units")
        report = model["privacy_report"]
        assert report["guarantee"]["privacy_unit"] == {"column": "critic"}
        assert report["plan"]["privacy_unit"] == {"column": "critic", "max_records_per_unit": 8}
        columns = next(fact for fact in report["treated_as_public"] if fact["what"] == "names of the columns read")
        assert columns["value"] == {"text": "text", "label": "label", "privacy_unit": "critic"}
        assert not any("several records" in text for text in report["not_covered"])
        checks = check_report(report)
        assert [check.name for check in checks if not check.holds] == []
        told = json.dumps([job.model_dump(mode="json"), model])
        assert str(ROWS) not in [word.strip(' ,:"') for word in told.split()]
        assert "critic-0" not in told
