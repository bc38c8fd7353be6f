"""/v1/fine_tuning/jobs as its users see it: over HTTP, and through the unmodified openai client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from app.db.session import Database
from app.jobs import lifecycle
from app.jobs.tables import Job
from app.privacy.plan import PrivacyPlan
from tests.app.jobs.conftest import MODEL
from tests.app.jobs.test_lifecycle import MODEL_FIELDS, all_steps, beat, claim
from tests.app.jobs.test_submission import counts

JOBS = "/v1/fine_tuning/jobs"
MakeFile = Callable[..., str]


def key(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def create(client: TestClient, training_file: str, **body: Any) -> dict[str, Any]:
    answer = client.post(JOBS, json={"model": MODEL, "training_file": training_file, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- the wire --------------------------------------------------------------------------------------------------------


@pytest.mark.every_database
def test_the_openai_client_drives_a_job(openai_client: openai.OpenAI, make_file: MakeFile, database: Database):
    file_id = make_file()
    jobs = openai_client.fine_tuning.jobs
    job = jobs.create(model=MODEL, training_file=file_id)  # nothing else: private by default
    assert (job.object, job.status, job.model, job.training_file) == ("fine_tuning.job", "queued", MODEL, file_id)
    assert (job.fine_tuned_model, job.trained_tokens, job.result_files, job.error) == (None, None, [], None)
    assert job.hyperparameters.n_epochs == 30
    assert job.model_extra is not None
    privacy = job.model_extra["privacy"]
    assert (privacy["mechanism"], privacy["target_epsilon"], privacy["target_delta"]) == ("dp_sgd", 3.0, 1e-6)
    assert privacy["neighboring_relation"] == "zero_out"
    assert privacy["epsilon_reserved"] == privacy["epsilon"] <= 3.0
    assert privacy["epsilon_spent"] == 0.0
    assert privacy["noise_multiplier"] > 0.0

    custom = jobs.create(
        model=MODEL,
        training_file=file_id,
        suffix="ward-7",
        seed=3,
        metadata={"team": "x"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 5}}},
        extra_body={"privacy": {"target_epsilon": 1.0, "target_delta": 1e-5}, "adaptation": {"type": "bitfit"}},
    )
    assert (custom.seed, custom.metadata, custom.hyperparameters.n_epochs) == (3, {"team": "x"}, 5)
    assert custom.model_extra is not None
    assert custom.model_extra["adaptation"] == {"type": "bitfit"}
    assert custom.model_extra["queue_position"] == 2

    assert [row.id for row in jobs.list()] == [custom.id, job.id]
    assert [row.id for row in jobs.list(metadata={"team": "x"})] == [custom.id]
    assert [row.id for row in jobs.list(limit=1).data] == [custom.id]
    assert jobs.retrieve(job.id).id == job.id

    cancelled = jobs.cancel(custom.id)
    assert cancelled.status == "cancelled"
    assert cancelled.model_extra is not None
    assert cancelled.model_extra["privacy"]["epsilon_spent"] == 0.0
    events = [event.model_extra["code"] for event in jobs.list_events(custom.id) if event.model_extra is not None]
    assert events == ["job_cancelled", "job_queued", "job_created"]
    assert jobs.checkpoints.list(custom.id).data == []

    claimed = claim(database, job.id)
    with database.writing() as session:
        lifecycle.succeed(session, job.id, claimed.fence, all_steps(claimed), MODEL_FIELDS)
    done = jobs.retrieve(job.id)
    assert done.status == "succeeded"
    assert done.fine_tuned_model is not None
    assert done.finished_at is not None


def test_errors_arrive_as_the_clients_own_exceptions(openai_client: openai.OpenAI, make_file: MakeFile):
    jobs, file_id = openai_client.fine_tuning.jobs, make_file()
    with pytest.raises(openai.NotFoundError) as missing:
        jobs.retrieve("ftjob-none")
    assert missing.value.code == "job_not_found"
    with pytest.raises(openai.NotFoundError) as model:
        jobs.create(model="gpt-5", training_file=file_id)
    assert (model.value.code, model.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as epsilon:
        jobs.create(model=MODEL, training_file=file_id, extra_body={"privacy": {"target_epsilon": 0}})
    assert (epsilon.value.code, epsilon.value.param) == ("invalid_epsilon", "privacy.target_epsilon")
    with pytest.raises(openai.BadRequestError) as budget:
        jobs.create(model=MODEL, training_file=file_id, extra_body={"privacy": {"target_epsilon": 30}})
    assert budget.value.code == "budget_exceeded"
    assert isinstance(budget.value.body, dict)
    assert budget.value.body["nearest_plan"]["target_epsilon"] == 10.0
    assert budget.value.body["epsilon_remaining"] == 10.0
    with pytest.raises(openai.BadRequestError) as paused:
        jobs.pause(jobs.create(model=MODEL, training_file=file_id).id)
    assert paused.value.code == "not_supported"


def test_events_stream_until_the_job_has_ended(client: TestClient, make_file: MakeFile):
    job_id = create(client, make_file())["id"]
    client.post(f"{JOBS}/{job_id}/cancel")
    with client.stream("GET", f"{JOBS}/{job_id}/events", headers={"accept": "text/event-stream"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line.startswith(("id:", "data:"))]
    assert lines[-1] == "data: [DONE]"
    assert '"code":"job_cancelled"' in lines[-3]
    last = lines[-4].removeprefix("id: ")  # resume after the second event
    resumed = client.get(f"{JOBS}/{job_id}/events", headers={"accept": "text/event-stream", "last-event-id": last}).text
    assert "job_queued" not in resumed
    assert "job_cancelled" in resumed


# --- one project's jobs are its own ----------------------------------------------------------------------------------


def test_a_foreign_job_is_a_missing_one(client: TestClient, make_file: MakeFile, make_key: Callable[..., str]):
    job_id = create(client, make_file())["id"]
    stranger = key(make_key("admin", project="other"))
    for method, path in (
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/checkpoints"),
        ("POST", "/cancel"),
        ("POST", "/pause"),
        ("POST", "/resume"),
    ):
        foreign = client.request(method, f"{JOBS}/{job_id}{path}", headers=stranger)
        missing = client.request(method, f"{JOBS}/ftjob-none{path}", headers=stranger)
        assert (foreign.status_code, foreign.json()) == (missing.status_code, missing.json())
        assert foreign.status_code == 404
    assert client.get(JOBS, headers=stranger).json()["data"] == []
    assert client.get(f"{JOBS}/{job_id}").json()["status"] == "queued"


def test_a_reader_may_look_but_neither_estimate_nor_submit(
    client: TestClient, make_file: MakeFile, make_key: Callable[..., str]
):
    body = {"model": MODEL, "training_file": make_file()}
    reader = key(make_key("read"))
    job_id = create(client, body["training_file"])["id"]
    assert client.get(f"{JOBS}/{job_id}", headers=reader).status_code == 200
    for path in ("", "/estimate", f"/{job_id}/cancel"):
        assert client.post(JOBS + path, json=body, headers=reader).status_code == 403


# --- estimate --------------------------------------------------------------------------------------------------------


def test_an_estimate_is_what_the_submit_answers(client: TestClient, make_file: MakeFile, database: Database):
    body = {"model": MODEL, "training_file": make_file(), "privacy": {"target_epsilon": 2.0}}
    before = counts(database)
    estimate = client.post(f"{JOBS}/estimate", json=body).json()
    assert counts(database) == before
    assert estimate["feasible"] is True
    assert (estimate["queue_position"], estimate["seconds"], estimate["memory_bytes"]) == (1, None, None)
    job = create(client, **{name: value for name, value in body.items() if name != "model"})
    assert {name: job["privacy"][name] for name in estimate["privacy"]} == estimate["privacy"]
    (budget,) = estimate["budgets"]
    now = client.get(f"/v1/privacy_budgets/{budget['privacy_budget']}").json()
    assert now["epsilon_remaining"] == budget["epsilon_remaining_after"] < budget["epsilon_remaining"] == 10.0


def test_a_column_of_the_owners_choice_is_no_public_class_list(
    client: TestClient, make_file: MakeFile, make_key: Callable[..., str]
):
    """A submit key may name any column: of a private file, its values are told to nobody for that."""
    secrets = [f"{name}@ward.example" for name in ("ada", "bob")]
    columns: list[dict[str, Any]] = [
        {"name": "text", "classes": None, "nulls": None},
        {"name": "email", "classes": secrets, "nulls": None},
    ]
    submitter = key(make_key("submit"))
    body = {
        "model": MODEL,
        "training_file": make_file(columns=columns),
        "task": {"columns": {"label": "email"}},
    }
    for path in ("", "/estimate"):
        answer = client.post(JOBS + path, json=body, headers=submitter)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "labels_required")
        assert "ward.example" not in answer.text
    estimate = client.post(f"{JOBS}/estimate", json=body).json()
    assert estimate["feasible"]
    assert (estimate["task"]["num_labels"], "labels" in estimate["task"]) == (2, False)
    declared = client.post(
        f"{JOBS}/estimate",
        json={**body, "task": {"columns": {"label": "email"}, "labels": secrets}},
        headers=submitter,
    ).json()
    assert declared["task"]["labels"] == secrets


def test_a_failed_job_tells_what_it_executed_and_what_it_is_charged(
    client: TestClient, make_file: MakeFile, database: Database
):
    job_id = create(client, make_file())["id"]
    claimed = claim(database, job_id)
    beat(database, claimed, centring=1, head=7)
    with database.writing() as session:
        lifecycle.fail(session, job_id, claimed.fence, "trainer_error")
    job = client.get(f"{JOBS}/{job_id}").json()
    assert (job["progress"]["step"], job["progress"]["executed"]) == (8, {"centring": 1, "head": 7})
    assert job["privacy"]["epsilon_spent"] == job["privacy"]["epsilon"]
    assert job["privacy"]["charged_in_full"] is True


def test_a_job_that_was_given_back_before_its_first_progress_can_be_looked_at(
    client: TestClient, make_file: MakeFile, database: Database
):
    job_id = create(client, make_file())["id"]
    claimed = claim(database, job_id)
    with database.writing() as session:
        lifecycle.requeue(session, job_id, claimed.fence, {})
    claim(database, job_id)
    assert client.get(f"{JOBS}/{job_id}").json()["estimated_finish"] is None


def test_an_estimate_of_what_does_not_fit_names_what_does(client: TestClient, make_file: MakeFile, database: Database):
    file_id = make_file()
    create(client, file_id, privacy={"target_epsilon": 7.0})
    body = {"model": MODEL, "training_file": file_id, "privacy": {"target_epsilon": 7.0}}
    answer = client.post(f"{JOBS}/estimate", json=body)
    assert answer.status_code == 200
    estimate = answer.json()
    assert (estimate["feasible"], estimate["error"]["code"]) == (False, "budget_exceeded")
    nearest = estimate["nearest_plan"]["target_epsilon"]
    assert 0.0 < nearest < 7.0
    assert create(client, file_id, privacy={"target_epsilon": nearest})["status"] == "queued"


def test_one_idempotency_key_is_one_job(client: TestClient, make_file: MakeFile):
    body = {"model": MODEL, "training_file": make_file()}
    first, second = (client.post(JOBS, json=body, headers={"idempotency-key": "k1"}).json() for _ in range(2))
    assert first["id"] == second["id"]
    third = client.post(JOBS, json={**body, "suffix": "x"}, headers={"idempotency-key": "k1"})
    assert (third.status_code, third.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert third.headers["x-should-retry"] == "false"


@pytest.mark.every_database
def test_metadata_filters_take_any_text(client: TestClient, make_file: MakeFile):
    odd = {"a.b": "1", "ключ": "знач", "$[0]": "x", "it's": "y", 'a"b\\': "z"}
    job_id = create(client, make_file(), metadata=odd)["id"]
    create(client, make_file(), metadata={"a.b": "2"}, privacy={"target_epsilon": 1.0})
    for name, value in odd.items():
        listed = client.get(JOBS, params={f"metadata[{name}]": value}).json()["data"]
        assert [row["id"] for row in listed] == [job_id]
    assert client.get(JOBS, params={"metadata[a.b]": "3"}).json()["data"] == []


# --- what a running job tells ----------------------------------------------------------------------------------------


def test_progress_and_what_was_spent_so_far(client: TestClient, make_file: MakeFile, database: Database):
    job_id = create(client, make_file())["id"]
    claimed = claim(database, job_id)
    spent = []
    for head in (1, 40, 119, 120):
        beat(database, claimed, centring=1, head=head)
        job = client.get(f"{JOBS}/{job_id}").json()
        assert job["progress"]["step"] == 1 + head
        assert job["progress"]["num_steps"] == 122
        spent.append(job["privacy"]["epsilon_spent"])
        assert "upper bound" in job["privacy"]["epsilon_spent_accountant"] or spent[-1] == job["privacy"]["epsilon"]
    assert 0.0 < spent[0] < spent[1] <= spent[2] <= spent[3] <= job["privacy"]["epsilon"]
    assert job["queue_position"] is None
    assert job["estimated_finish"] >= job["started_at"]


def test_what_was_spent_is_an_upper_bound(client: TestClient, make_file: MakeFile, database: Database):
    from app.privacy.accountants import pld_epsilon
    from app.privacy.dp_events import event_for

    job_id = create(client, make_file())["id"]
    claimed = claim(database, job_id)
    for head in (1, 20, 80):
        executed = {"centring": 1, "head": head}
        beat(database, claimed, **executed)
        exact = pld_epsilon(event_for(claimed.plan.executed(executed)), 1e-6).epsilon
        told = client.get(f"{JOBS}/{job_id}").json()["privacy"]["epsilon_spent"]
        assert exact <= told <= (claimed.plan.epsilon or 0.0)


def test_a_job_without_a_mechanism(client: TestClient, make_file: MakeFile, database: Database):
    job = create(client, make_file(public=True), privacy={"mechanism": "none"})
    assert (job["privacy"]["mechanism"], job["privacy"]["privacy_budget"]) == ("none", None)
    with database.reading() as session:
        stored = session.get_one(Job, job["id"])
    assert PrivacyPlan.from_dict(stored.plan or {}).epsilon is None
    assert client.post(f"{JOBS}/{job['id']}/cancel").json()["status"] == "cancelled"


def test_a_private_file_needs_a_mechanism(client: TestClient, make_file: MakeFile):
    body = {"model": MODEL, "training_file": make_file(), "privacy": {"mechanism": "none"}}
    assert client.post(JOBS, json=body).json()["error"]["code"] == "mechanism_not_allowed"


def test_a_job_that_waits_for_its_file(client: TestClient, make_file: MakeFile):
    file_id = make_file(status="uploaded")
    job = create(client, file_id, privacy={"target_epsilon": 2.0})
    assert (job["status"], job["privacy"]["target_epsilon"], job["progress"]) == ("validating_files", 2.0, None)
    assert job["hyperparameters"]["n_epochs"] == "auto"
    body = {"model": MODEL, "training_file": file_id}
    assert client.post(f"{JOBS}/estimate", json=body).json()["error"]["code"] == "file_not_processed"


def test_hints_go_out_after_the_commit(client: TestClient, make_file: MakeFile, broker: str):
    """To a real broker: one message, which carries the job's id and nothing else of the request."""
    import json

    import redis

    job_id = create(client, make_file(), suffix="canary-suffix")["id"]
    with redis.Redis(unix_socket_path=broker.removeprefix("redis+socket://")) as connection:
        messages = [json.loads(raw) for raw in connection.lrange("training", 0, -1)]
    assert len(messages) == 1
    assert messages[0]["headers"]["task"] == "train_job"
    assert job_id in messages[0]["headers"]["argsrepr"]
    assert "canary-suffix" not in json.dumps(messages)
