"""Every call of the wire that this service answers, by the unmodified `openai` client against a running service."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import Stream
from openai.types.fine_tuning import FineTuningJobEvent

from tests.running import BASE_MODEL, Running, until, wait_for_job, write_snippets

#: Slow enough to be met while it trains: every step goes through the whole encoder.
LONG_JOB: dict[str, Any] = {
    "adaptation": {"type": "bitfit"},
    "privacy": {"target_epsilon": 4.0, "target_delta": 1e-5},
    "task": {"type": "text_classification", "labels": ["negative", "positive"], "max_length": 64},
    "evaluation": "none",
}


def events_of(client: openai.OpenAI, job_id: str) -> list[Any]:
    """Oldest first."""
    return list(client.fine_tuning.jobs.list_events(job_id, limit=7))[::-1]


def test_files(client: openai.OpenAI, tmp_path: Path) -> None:
    source = write_snippets(tmp_path / "own.csv", 60, start=3)
    file = client.files.create(file=source, purpose="fine-tune")
    assert (file.object, file.filename, file.bytes, file.purpose) == (
        "file",
        "own.csv",
        source.stat().st_size,
        "fine-tune",
    )
    file = client.files.wait_for_processing(file.id, poll_interval=0.1, max_wait_seconds=60)
    assert file.status == "processed"
    assert client.files.retrieve(file.id).id == file.id
    assert file.id in [other.id for other in client.files.list(limit=2)]
    assert client.files.content(file.id).read() == source.read_bytes()
    deleted = client.files.delete(file.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (file.id, True, "file")
    with pytest.raises(openai.NotFoundError) as refused:
        client.files.retrieve(file.id)
    assert refused.value.code == "file_not_found"


def test_a_job_that_names_nothing_but_model_and_file_is_private(client: openai.OpenAI, dataset: Any) -> None:
    job = client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=dataset.id)
    assert job.object == "fine_tuning.job"
    privacy = job.model_extra["privacy"]
    assert (privacy["mechanism"], privacy["target_epsilon"], privacy["target_delta"]) == ("dp_sgd", 3.0, 1e-6)
    job = wait_for_job(client, job.id)
    assert job.status == "succeeded", job.error
    report = client.models.retrieve(job.fine_tuned_model).model_extra["privacy_report"]
    assert report["guarantee"]["epsilon"] <= 3.0
    classes = next(fact for fact in report["treated_as_public"] if fact["what"] == "list of classes")
    assert classes["source"] == "taken from the file"


def test_a_finished_job_says_what_it_did(client: openai.OpenAI, trained: Any, dataset: Any) -> None:
    job = client.fine_tuning.jobs.retrieve(trained.id)
    assert job.status == "succeeded"
    assert job.model == BASE_MODEL
    assert job.training_file == dataset.id
    assert job.seed == 7
    assert job.metadata == {"team": "ward-3"}
    assert job.created_at <= job.finished_at
    assert job.error is None
    assert job.trained_tokens is None
    assert job.result_files == []
    assert job.fine_tuned_model.startswith(f"ft-{BASE_MODEL}-snippets-")
    extra = job.model_extra
    assert extra["progress"]["step"] == extra["progress"]["num_steps"] > 0
    privacy = extra["privacy"]
    assert 0 < privacy["epsilon_spent"] <= privacy["target_epsilon"] == 8.0
    assert privacy["epsilon_reserved"] == 0.0
    assert privacy["noise_multiplier"] > 0
    assert "PLD" in privacy["accountant"]


def test_jobs_are_listed_and_filtered_by_metadata(client: openai.OpenAI, trained: Any) -> None:
    assert trained.id in [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    found = list(client.fine_tuning.jobs.list(metadata={"team": "ward-3"}))
    assert [job.id for job in found] == [trained.id]
    assert list(client.fine_tuning.jobs.list(metadata={"team": "nobody"})) == []


def test_events_tell_the_story_in_order_and_hold_nothing_private(
    client: openai.OpenAI, trained: Any, snippets: Path
) -> None:
    events = events_of(client, trained.id)
    codes = [event.model_extra["code"] for event in events]
    assert codes[:3] == ["job_created", "job_queued", "job_started"]
    assert codes[-1] == "job_succeeded"
    assert "trainer_started" in codes
    metrics = [event for event in events if event.type == "metrics"]
    for of, most in (("progress", 25), ("train_loss", 50)):
        steps = [event.data["step"] for event in metrics if event.model_extra["code"] == of]
        assert steps == sorted(set(steps))
        assert 1 < len(steps) <= most
    everything = "".join(event.to_json() for event in events if event.model_extra["code"] != "train_loss")
    assert "loss" not in everything
    assert "norm" not in everything


def test_the_training_loss_is_read_by_any_client(client: openai.OpenAI, trained: Any) -> None:
    losses = [event.data for event in events_of(client, trained.id) if event.model_extra["code"] == "train_loss"]
    assert losses[-1]["step"] <= losses[-1]["total_steps"] == trained.progress["num_steps"]
    for told in losses:
        low, high = told["train_loss_interval_95"]
        assert 0.0 <= low <= told["train_loss"] <= high <= trained.privacy["loss_curve"]["bound"]
        assert told["train_loss_noise_std"] > 0.0
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(trained.id)
    assert checkpoint.metrics.train_loss == losses[-1]["train_loss"]
    model = client.get(f"/models/{trained.fine_tuned_model}", cast_to=object)
    curve = model["metrics"]["train_loss_curve"]
    assert curve == [{key: value for key, value in told.items() if key != "total_steps"} for told in losses]


def test_events_stream_live_and_resume(client: openai.OpenAI, trained: Any) -> None:
    def stream(headers: dict[str, str]) -> list[Any]:
        with client.get(
            f"/fine_tuning/jobs/{trained.id}/events",
            cast_to=object,
            stream=True,
            stream_cls=Stream[FineTuningJobEvent],
            options={"headers": {"Accept": "text/event-stream", **headers}},
        ) as received:
            return list(received)

    told = stream({})
    assert [event.id for event in told] == [event.id for event in events_of(client, trained.id)]
    rest = stream({"Last-Event-ID": told[2].id})
    assert [event.id for event in rest] == [event.id for event in told[3:]]


def test_the_checkpoint_of_a_job_that_succeeded_is_its_model(client: openai.OpenAI, trained: Any) -> None:
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(trained.id)  # follows the pages to their end
    assert checkpoint.fine_tuned_model_checkpoint == trained.fine_tuned_model
    assert checkpoint.fine_tuning_job_id == trained.id
    assert checkpoint.step_number == trained.progress["num_steps"]
    assert checkpoint.epsilon_spent == trained.privacy["epsilon_spent"]


def test_an_estimate_stores_nothing(client: openai.OpenAI, dataset: Any, service: Running) -> None:
    def rows() -> list[int]:
        with service.database() as database:
            tables = ("jobs", "reservations", "ledger_entries", "job_events", "job_keys")
            return [database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables]

    before = rows()
    body = {"model": BASE_MODEL, "training_file": dataset.id, **LONG_JOB}
    estimate: Any = client.post("/fine_tuning/jobs/estimate", body=body, cast_to=object)
    assert estimate["feasible"] is True
    assert estimate["privacy"]["noise_multiplier"] > 0
    assert 0 < estimate["privacy"]["epsilon"] <= 4.0
    assert estimate["budgets"][0]["epsilon_remaining_after"] < estimate["budgets"][0]["epsilon_remaining"]
    assert rows() == before


def test_a_running_job_is_cancelled_within_a_step_and_charged_what_it_executed(
    client: openai.OpenAI, dataset: Any
) -> None:
    job = client.fine_tuning.jobs.create(
        model=BASE_MODEL,
        training_file=dataset.id,
        extra_body={**LONG_JOB, "hyperparameters": {"n_epochs": 200, "batch_size": 40}},
    )

    def training() -> Any:
        now = client.fine_tuning.jobs.retrieve(job.id)
        assert now.status in ("queued", "running"), now.error
        return now if now.estimated_finish is not None else None

    running = until(training, 60)
    assert running.model_extra["progress"]["step"] > 0
    assert running.estimated_finish >= running.model_extra["started_at"]
    asked = time.monotonic()
    client.fine_tuning.jobs.cancel(job.id)
    ended = wait_for_job(client, job.id, 30)
    assert time.monotonic() - asked < 15
    assert ended.status == "cancelled"
    assert ended.fine_tuned_model is None
    progress, privacy = ended.model_extra["progress"], ended.model_extra["privacy"]
    assert 0 < progress["step"] < progress["num_steps"]
    assert 0 < privacy["epsilon_spent"] < privacy["epsilon"]
    entries = client.get(f"/privacy_budgets/{privacy['privacy_budget']}/entries?limit=100", cast_to=object)["data"]  # type: ignore[index]
    charged = [entry for entry in entries if entry["job_id"] == job.id]
    assert [entry["kind"] for entry in sorted(charged, key=lambda entry: entry["sequence"])] == [
        "reserved",
        "charged",
        "released",
    ]
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"  # again: nothing changes


def test_pause_is_refused_by_name(client: openai.OpenAI, trained: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.pause(trained.id)
    assert refused.value.code == "not_supported"


def test_models(client: openai.OpenAI, trained: Any) -> None:
    ids = [model.id for model in client.models.list()]
    assert BASE_MODEL in ids
    assert trained.fine_tuned_model in ids
    model = client.models.retrieve(trained.fine_tuned_model)
    assert model.object == "model"
    report = model.model_extra["privacy_report"]
    assert report["job"] == trained.id
    assert report["digests"]["plan"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("ft-of-someone-else")


def test_the_catalog(client: openai.OpenAI) -> None:
    bases: Any = client.get("/base_models", cast_to=object)
    assert BASE_MODEL in [base["id"] for base in bases["data"]]
    tasks: Any = client.get("/tasks", cast_to=object)
    assert "text_classification" in str(tasks)


def test_a_deleted_model_is_gone_and_its_charge_stays(client: openai.OpenAI, dataset: Any) -> None:
    job = client.fine_tuning.jobs.create(
        model=BASE_MODEL,
        training_file=dataset.id,
        extra_body={"adaptation": {"type": "head"}, "privacy": {"target_epsilon": 0.5}, "evaluation": "none"},
    )
    job = wait_for_job(client, job.id)
    assert job.status == "succeeded", job.error
    budget = job.model_extra["privacy"]["privacy_budget"]
    before: Any = client.get(f"/privacy_budgets/{budget}", cast_to=object)
    deleted = client.models.delete(job.fine_tuned_model)
    assert (deleted.id, deleted.deleted, deleted.object) == (job.fine_tuned_model, True, "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(job.fine_tuned_model)
    after: Any = client.get(f"/privacy_budgets/{budget}", cast_to=object)
    assert after["epsilon_spent"] == before["epsilon_spent"] > 0


def test_a_key_that_is_unknown_and_one_that_may_only_read(service: Running, dataset: Any) -> None:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="pt-nobody") as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
    reading = httpx.get(f"{service.url}/v1/files")
    assert reading.status_code == 401
    assert reading.json()["error"]["code"] == "missing_api_key"
