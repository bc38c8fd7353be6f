"""What a user can get wrong: refused with a fixed code, a place where there is one, and never a private value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from tests.app.files.hostile import CASES
from tests.running import BASE_MODEL, wait_for_job, write_snippets

SECRET = "Zaphod-Beeblebrox-1977"
GOOD = "".join(f"fine text number {i},{'positive' if i % 2 else 'negative'}\n" for i in range(40))


def upload(client: openai.OpenAI, content: bytes, name: str = "data.csv") -> Any:
    """Uploaded and processed, or refused."""
    file = client.files.create(file=(name, content), purpose="fine-tune")
    return client.files.wait_for_processing(file.id, poll_interval=0.05, max_wait_seconds=60)


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        (b"", "empty_file", None),
        (b"text,label\n", "no_rows", None),
        (b"text,label\nfine,positive\n\xff\xfe broken,negative\n", "undecodable_bytes", None),
        (f"text,label\n{GOOD}{SECRET},positive,{SECRET}\n{GOOD}".encode(), "too_many_cells", 42),
        (f"text,label\n{GOOD}{SECRET}\n{GOOD}".encode(), "too_few_cells", 42),
        (f"text,text\n{GOOD}".encode(), "duplicate_column", None),
    ],
    ids=["empty", "header-only", "bytes", "too-many-cells", "too-few-cells", "twice-the-column"],
)
def test_a_file_that_is_no_dataset(client: openai.OpenAI, content: bytes, code: str, line: int | None) -> None:
    file = upload(client, content)
    assert file.status == "error"
    error = file.model_extra["error"]
    assert error["code"] == code
    if line is not None:
        assert error["line"] == line
        assert str(line) in file.status_details
    assert SECRET not in file.to_json()
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file.id)
    assert refused.value.code == "file_failed"
    assert refused.value.param == "training_file"


def test_a_broken_line_in_the_middle_of_jsonl(client: openai.OpenAI) -> None:
    lines = [f'{{"text": "fine {i}", "label": "{"ab"[i % 2]}"}}' for i in range(30)]
    lines[17] = f'{{"text": "{SECRET}", "label": '
    file = upload(client, "\n".join(lines).encode(), "data.jsonl")
    assert file.status == "error"
    assert file.model_extra["error"]["line"] == 18
    assert SECRET not in file.to_json()


@pytest.mark.parametrize("name", ["gzip cut off", "a bomb", "a name that leads out", "a link", "an SVG"])
def test_a_hostile_file(client: openai.OpenAI, name: str) -> None:
    filename, make, code = CASES[name]
    file = upload(client, make(), filename)
    assert (file.status, file.model_extra["error"]["code"]) == ("error", code)
    assert file.status_details


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"model": "gpt-17"}, "model_not_found", "model"),
        ({"training_file": "file-nowhere"}, "file_not_found", "training_file"),
        ({"task": {"type": "palm_reading"}}, "task_not_supported", "task.type"),
        ({"task": {"columns": {"text": "prose"}}}, "column_not_found", "task.columns.text"),
        ({"task": {"labels": ["positive", "neutral"]}}, "label_not_declared", "training_file"),
        ({"adaptation": {"type": "levitation"}}, "adaptation_not_supported", "adaptation.type"),
        ({"privacy": {"target_epsilon": 0}}, "invalid_epsilon", "privacy.target_epsilon"),
        ({"privacy": {"target_epsilon": -1.0}}, "invalid_epsilon", "privacy.target_epsilon"),
        ({"privacy": {"target_delta": 0.0025}}, "delta_too_large", "privacy.target_delta"),
        ({"privacy": {"mechanism": "none"}}, "mechanism_not_allowed", "privacy.mechanism"),
        ({"privacy": {"target_epsilon": 900.0}}, "budget_exceeded", "privacy.target_epsilon"),
        ({"privacy": {"epsilon": 1.0}}, None, "privacy.epsilon"),
        ({"hyperparameters": {"n_epochs": -3}}, None, "hyperparameters.n_epochs"),
        ({"moonlight": True}, "unknown_parameter", "moonlight"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_job_that_cannot_be(
    client: openai.OpenAI, dataset: Any, change: dict[str, Any], code: str | None, param: str
) -> None:
    body = {"model": BASE_MODEL, "training_file": dataset.id, **change}
    before = {job.id for job in client.fine_tuning.jobs.list(limit=100)}
    with pytest.raises(openai.APIStatusError) as refused:
        client.fine_tuning.jobs.create(
            model=body.pop("model"), training_file=body.pop("training_file"), extra_body=body
        )
    error = refused.value
    assert error.status_code in (400, 404)
    if code is not None:
        assert (error.code, error.param) == (code, param)
    else:
        assert error.param is not None
        assert error.param.startswith(param)
    assert error.body["message"]  # type: ignore[index]
    assert {job.id for job in client.fine_tuning.jobs.list(limit=100)} == before


def test_a_refused_plan_says_what_is_left_and_the_nearest_that_fits(client: openai.OpenAI, dataset: Any) -> None:
    body = {"model": BASE_MODEL, "training_file": dataset.id, "privacy": {"target_epsilon": 900.0}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(
            model=BASE_MODEL, training_file=dataset.id, extra_body={"privacy": body["privacy"]}
        )
    error: Any = refused.value.body
    assert error["epsilon_remaining"] > 0
    nearest = error["nearest_plan"]
    assert nearest is not None
    estimate: Any = client.post("/fine_tuning/jobs/estimate", body=body, cast_to=object)
    assert estimate["feasible"] is False
    assert estimate["error"]["code"] == "budget_exceeded"
    assert estimate["nearest_plan"] == nearest
    fits = {**body, "privacy": {"target_epsilon": nearest["target_epsilon"]}}
    assert client.post("/fine_tuning/jobs/estimate", body=fits, cast_to=object)["feasible"] is True  # type: ignore[index]


def test_a_dataset_of_one_class(client: openai.OpenAI) -> None:
    file = upload(client, ("text,label\n" + "".join(f"fine {i},{SECRET}\n" for i in range(40))).encode())
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file.id)
    assert (refused.value.code, refused.value.param) == ("one_class_only", "training_file")
    assert SECRET not in str(refused.value)


def test_columns_that_are_not_there(client: openai.OpenAI) -> None:
    file = upload(client, f"prose,verdict\n{GOOD}".encode())
    assert file.status == "processed"
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file.id)
    assert refused.value.code == "column_not_found"


def test_a_file_that_a_job_needs_cannot_be_deleted(client: openai.OpenAI, tmp_path: Path) -> None:
    source = write_snippets(tmp_path / "held.csv", 120, start=5)
    file = client.files.create(file=source, purpose="fine-tune")
    file = client.files.wait_for_processing(file.id, poll_interval=0.1, max_wait_seconds=60)
    job = client.fine_tuning.jobs.create(
        model=BASE_MODEL,
        training_file=file.id,
        extra_body={
            "adaptation": {"type": "bitfit"},
            "hyperparameters": {"n_epochs": 100, "batch_size": 12},
            "evaluation": "none",
            "privacy": {"target_epsilon": 2.0},
        },
    )
    with pytest.raises(openai.ConflictError) as refused:
        client.files.delete(file.id)
    assert refused.value.code == "file_in_use"
    assert refused.value.response.headers["x-should-retry"] == "false"
    client.fine_tuning.jobs.cancel(job.id)
    assert wait_for_job(client, job.id, 30).status == "cancelled"
    assert client.files.delete(file.id).deleted


def test_a_public_file_may_be_read_without_privacy_and_never_after_it_was_private(
    client: openai.OpenAI, snippets: Path
) -> None:
    with pytest.raises(openai.ConflictError) as refused:
        client.files.create(file=snippets, purpose="fine-tune", extra_body={"public": "true"})
    assert refused.value.code == "was_private"
