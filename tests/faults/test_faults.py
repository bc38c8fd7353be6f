"""Processes killed mid-job, hints lost and repeated: the job ends once, and its ledger and weights are right."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from app.queue import Queue
from tests.faults import replay
from tests.running import BASE_MODEL, REPOSITORY, Running, gone, until, wait_for_job, write_snippets

#: Impatient, so that a fault is noticed within seconds.
QUICK = {
    "PRIVTUNE_LEASE_SECONDS": "3",
    "PRIVTUNE_HEARTBEAT_SECONDS": "0.3",
    "PRIVTUNE_SWEEP_SECONDS": "0.5",
    "PRIVTUNE_CHECKPOINT_SECONDS": "0.5",
    "PRIVTUNE_THREADS": "1",
    "PRIVTUNE_BUDGET_EPSILON": "60",
}
#: Some seconds of steps through the whole encoder.
JOB: dict[str, Any] = {
    "task": {"type": "text_classification", "labels": ["negative", "positive"], "max_length": 32},
    "adaptation": {"type": "bitfit"},
    "hyperparameters": {"n_epochs": 4, "batch_size": 20},
    "privacy": {"target_epsilon": 5.0, "target_delta": 1e-5},
    "evaluation": {"split": 0.2},
}

#: Probabilities of a bundle's classes, by plain transformers.
ANSWER = """
import json, sys
from transformers import pipeline
answer = pipeline("text-classification", model=sys.argv[1], top_k=None)(["a fine film"])[0]
print(json.dumps({one["label"]: one["score"] for one in answer}))
"""

Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts services; what still runs at the end is stopped, and nothing may be left of it."""
    running: list[Running] = []

    def starter(*arguments: str, data_dir: Path = tmp_path / "data", **env: str) -> Running:
        running.append(Running(data_dir, *arguments, **{**QUICK, **env}))
        return running[-1]

    yield starter
    for service in running:
        print("".join(line for line in service.output if '"request"' not in line))  # shown where the test failed
        with service:
            family = set(service.tree()) if service.process.poll() is None else set()
        until(lambda family=family: gone(family), 10)


def upload(client: openai.OpenAI, folder: Path, rows: int = 160) -> Any:
    """A processed dataset."""
    file = client.files.create(file=write_snippets(folder / "rows.csv", rows), purpose="fine-tune")
    return client.files.wait_for_processing(file.id, poll_interval=0.1, max_wait_seconds=60)


def submit(client: openai.OpenAI, file_id: str, **change: Any) -> Any:
    """The job, created."""
    return client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file_id, extra_body={**JOB, **change})


def checkpointed(client: openai.OpenAI, job_id: str, times: int) -> None:
    """Waits until that many checkpoints were committed."""

    def enough() -> bool:
        job = client.fine_tuning.jobs.retrieve(job_id)
        assert job.status in ("queued", "running"), f"it ended before it could be disturbed: {job.error}"
        return codes(client, job_id).count("checkpoint_committed") >= times

    until(enough)


def codes(client: openai.OpenAI, job_id: str) -> list[str]:
    """The codes of the job's history, oldest first."""
    events = client.fine_tuning.jobs.list_events(job_id, limit=100)
    return [event.model_extra["code"] for event in events][::-1]


def weights(client: openai.OpenAI, job: Any) -> bytes:
    """The published model's."""
    answer = httpx.get(
        f"{client.base_url}models/{job.fine_tuned_model}/files/model.safetensors",
        headers={"authorization": f"Bearer {client.api_key}"},
        timeout=60,
    )
    return answer.raise_for_status().content


def ledger(client: openai.OpenAI, job: Any) -> list[tuple[str, float]]:
    """What the ledger says of the job, in order."""
    budget = job.model_extra["privacy"]["privacy_budget"]
    entries: Any = client.get(f"/privacy_budgets/{budget}/entries?limit=100", cast_to=object)
    mine = [entry for entry in entries["data"] if entry["job_id"] == job.id]
    return [(entry["kind"], entry["rho"]) for entry in sorted(mine, key=lambda entry: entry["sequence"])]


def charged_in_full(client: openai.OpenAI, job: Any) -> bool:
    """Reserved once, charged once, all of it."""
    entries = ledger(client, job)
    return [kind for kind, _ in entries] == ["reserved", "charged"] and entries[0][1] == entries[1][1] > 0


def test_trainer_and_worker_killed_broker_flushed_hints_repeated(start: Start, tmp_path: Path) -> None:
    service = start()
    with service.client() as client:
        job = submit(client, upload(client, tmp_path).id)
        undisturbed = tmp_path / "undisturbed"
        undisturbed.mkdir()
        first = service.training()
        key = replay.record(service, job.id, undisturbed)
        checkpointed(client, job.id, 1)
        os.kill(first, signal.SIGKILL)
        second = service.training(attempt=2)
        assert second != first
        checkpointed(client, job.id, 2)
        os.kill(service.find("worker.main training"), signal.SIGKILL)
        until(lambda: gone({second}), 5)  # the trainer ends with its worker
        with service.broker() as broker:
            broker.flushall()
            queue = Queue(f"redis+socket://{broker.connection_pool.connection_kwargs['path']}")
            for _ in range(20):
                queue.hint_job(job.id)
            queue.close()
        ended = wait_for_job(client, job.id)
        assert ended.status == "succeeded", ended.error
        assert ended.model_extra["attempts"] == 3
        story = codes(client, job.id)
        assert story.count("job_started") == 3
        assert story.count("job_succeeded") == 1
        assert charged_in_full(client, ended)
        assert weights(client, ended) == replay.run(undisturbed, key)
        assert [entry["attempt"] for entry in service.logged("trainer_begins")] == [1, 2, 3]
        leftovers = [path for path in (service.data_dir / "storage").rglob("checkpoints") if any(path.iterdir())]
        assert leftovers == []


@pytest.mark.parametrize("has_rows", [True, False])
def test_a_job_whose_trainer_always_dies_fails_and_is_charged_in_full_if_it_had_the_rows(
    start: Start, tmp_path: Path, has_rows: bool
) -> None:
    service = start(PRIVTUNE_MAX_ATTEMPTS="2")
    with service.client() as client:
        job = submit(client, upload(client, tmp_path).id)
        for attempt in (1, 2):
            trainer = service.training(attempt)
            if has_rows:
                replay.rows_given(service)
            os.kill(trainer, signal.SIGKILL)
        ended = wait_for_job(client, job.id)
        assert (ended.status, ended.error.code) == ("failed", "trainer_error")
        assert ended.fine_tuned_model is None
        assert charged_in_full(client, ended) == has_rows
        promised = ended.model_extra["privacy"]["epsilon"]
        assert ended.model_extra["privacy"]["epsilon_spent"] == (promised if has_rows else 0.0)


@pytest.mark.parametrize("has_rows", [True, False])
def test_a_job_whose_worker_always_dies_is_charged_in_full_if_its_trainer_had_the_rows(
    start: Start, tmp_path: Path, has_rows: bool
) -> None:
    service = start(PRIVTUNE_MAX_ATTEMPTS="1")
    with service.client() as client:
        job = submit(client, upload(client, tmp_path).id)
        service.training()
        if has_rows:
            replay.rows_given(service)
        os.kill(service.find("worker.main training"), signal.SIGKILL)
        ended = wait_for_job(client, job.id)
        assert (ended.status, ended.error.code) == ("failed", "worker_lost")
        assert charged_in_full(client, ended) == has_rows
        promised = ended.model_extra["privacy"]["epsilon"]
        assert ended.model_extra["privacy"]["epsilon_spent"] == (promised if has_rows else 0.0)


def test_a_job_that_takes_too_long_fails_and_is_charged_in_full(start: Start, tmp_path: Path) -> None:
    service = start(PRIVTUNE_MAX_JOB_SECONDS="8")
    with service.client() as client:
        job = submit(client, upload(client, tmp_path).id, hyperparameters={"n_epochs": 1000, "batch_size": 20})
        replay.rows_given(service)
        ended = wait_for_job(client, job.id)
        assert (ended.status, ended.error.code) == ("failed", "time_limit")
        assert charged_in_full(client, ended)


def test_a_worker_that_wakes_up_after_its_lease_writes_nothing(start: Start, tmp_path: Path) -> None:
    service = start()
    with service.client() as client:
        job = submit(client, upload(client, tmp_path).id)
        checkpointed(client, job.id, 1)
        sleeper, first = service.find("worker.main training"), service.training()
        os.kill(sleeper, signal.SIGSTOP)
        other = worker(service, "--queues", "training")
        try:
            until(lambda: codes(client, job.id).count("job_started") == 2)
            os.kill(sleeper, signal.SIGCONT)
            until(lambda: gone({first}), 10)
            ended = wait_for_job(client, job.id)
            assert ended.status == "succeeded", ended.error
            story = codes(client, job.id)
            assert (story.count("job_started"), story.count("job_succeeded")) == (2, 1)
            assert charged_in_full(client, ended)
            assert service.logged("lease_lost")
        finally:
            os.kill(sleeper, signal.SIGCONT)
            other.terminate()
            other.wait(30)


def test_ctrl_c_gives_the_job_back_and_a_kill_of_everything_leaves_no_orphan(start: Start, tmp_path: Path) -> None:
    service = start()
    with service.client() as client:
        job = submit(client, upload(client, tmp_path).id)
        checkpointed(client, job.id, 1)
    family = set(service.tree())
    assert len(family) >= 6  # service, broker, worker, its two processes, a trainer
    assert service.stop(signal.SIGINT) == 0
    assert gone(family)
    assert list((service.data_dir / "jobs").glob("job-*")) == []
    with service.database() as database:
        row = database.execute("SELECT status, attempts, interrupted, checkpoint IS NOT NULL FROM jobs").fetchone()
    assert row == ("queued", 0, 0, 1)

    service = start()
    service.training()
    family = set(service.tree())
    assert len(family) >= 6
    service.kill()
    until(lambda: gone(family), 5)

    service = start()
    with service.client() as client:
        ended = wait_for_job(client, job.id)
        assert ended.status == "succeeded", ended.error
        assert ended.model_extra["attempts"] == 2
        assert charged_in_full(client, ended)


def test_hints_that_were_lost_before_any_worker_ran(start: Start, tmp_path: Path) -> None:
    service = start("--no-worker")
    assert not [command for command in service.tree().values() if "-m worker" in command]
    with service.client() as client:
        file = client.files.create(file=write_snippets(tmp_path / "rows.csv", 160), purpose="fine-tune")
        job = submit(client, file.id, adaptation={"type": "head"}, hyperparameters={})
        assert job.status == "validating_files"
        with service.broker() as broker:
            assert broker.llen("files") >= 1
            broker.flushall()
        process = worker(service)
        try:
            ended = wait_for_job(client, job.id)
            assert ended.status == "succeeded", ended.error
            assert codes(client, job.id).count("job_started") == 1
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def test_a_checkpoint_that_was_taken_survives_kills_and_a_cancel(start: Start, tmp_path: Path) -> None:
    service = start()
    with (
        service.client() as client,
        httpx.Client(
            base_url=f"{service.url}/v1", headers={"authorization": f"Bearer {client.api_key}"}, timeout=60
        ) as http,
    ):
        file, longer = upload(client, tmp_path), {"n_epochs": 10, "batch_size": 20}
        job = submit(client, file.id, hyperparameters=longer, checkpoints={"count": 8})

        def taken(count: int) -> list[Any]:
            found = client.fine_tuning.jobs.checkpoints.list(job.id).data
            assert client.fine_tuning.jobs.retrieve(job.id).status in ("queued", "running")
            return found if len(found) >= count else []

        until(lambda: taken(1))
        os.kill(service.training(), signal.SIGKILL)
        service.training(attempt=2)  # the job goes on from the last of them, and never before it
        early = client.fine_tuning.jobs.checkpoints.list(job.id).data
        first = early[-1]
        name = first.fine_tuned_model_checkpoint
        bundle = http.get(f"/models/{name}/download").raise_for_status()
        later = until(lambda: taken(len(early) + 1))
        os.kill(service.find("worker.main training"), signal.SIGKILL)
        client.fine_tuning.jobs.cancel(job.id)
        ended = wait_for_job(client, job.id)
        assert (ended.status, ended.fine_tuned_model) == ("cancelled", None)

        published = client.fine_tuning.jobs.checkpoints.list(job.id, limit=10).data
        assert published[-len(later) :] == later
        assert published[-len(early) :] == early
        steps = ended.model_extra["checkpoint_steps"]
        assert [checkpoint.step_number for checkpoint in reversed(published)] == steps[: len(published)]
        for checkpoint in published:
            assert checkpoint.id.startswith("ftckpt-")
            assert 0.0 < checkpoint.model_extra["epsilon_spent"] < 5.0
            assert client.models.retrieve(checkpoint.fine_tuned_model_checkpoint).model_extra["job"] == job.id
        again = http.get(f"/models/{name}/download", headers={"if-none-match": bundle.headers["etag"]})
        assert again.status_code == 304

        # What can be taken was charged: the ledger's figure is at least that of the last one.
        spent = ended.model_extra["privacy"]["epsilon_spent"]
        assert spent >= published[0].model_extra["epsilon_spent"]
        with tarfile.open(fileobj=io.BytesIO(bundle.content)) as archive:
            archive.extractall(tmp_path, filter="data")
        key = http.get("/privacy/signing_key").json()["public_key"]
        report = tmp_path / "model" / "privacy_report.json"
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", "verify", str(report), "--public-key", key],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(report.read_text())["checkpoint"]["step_number"] == first.step_number
        answers = subprocess.run(
            [sys.executable, "-c", ANSWER, str(tmp_path / "model")], capture_output=True, text=True, check=True
        )
        assert json.loads(answers.stdout).keys() == {"negative", "positive"}
        client.models.delete(name)
        assert first.id not in [left.id for left in client.fine_tuning.jobs.checkpoints.list(job.id).data]
        weights = [path for path in (service.data_dir / "storage").rglob("model.safetensors")]
        assert len(weights) == len(published) - 1


def worker(service: Running, *arguments: str) -> subprocess.Popen[bytes]:
    """`privtune worker` beside a service."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PRIVTUNE_")}
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", "worker", "--data-dir", str(service.data_dir), *arguments],
        cwd=REPOSITORY,
        env={**environment, **QUICK},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
