"""Bodies of /v1/fine_tuning/jobs that are refused: by name, and with what would do."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db.session import Database
from tests.app.jobs.conftest import MODEL
from tests.app.jobs.test_routes import JOBS, MakeFile
from tests.app.jobs.test_submission import counts


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"colour": "red"}, "unknown_parameter", "colour"),
        ({"a secret\n": 1}, "unknown_parameter", None),
        ({"model": 7}, "invalid_request", "model"),
        ({"training_file": None}, "invalid_request", "training_file"),
        ({"suffix": "x" * 65}, "invalid_request", "suffix"),
        ({"seed": -1}, "invalid_request", "seed"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "invalid_request", "metadata"),
        ({"suffix": "nul\0"}, "invalid_request", None),
        ({"privacy": {"epsilon": 3}}, "invalid_request", "privacy.epsilon"),
        ({"privacy": {"target_epsilon": "many"}}, "invalid_request", "privacy.target_epsilon"),
        ({"privacy": {"clipping": "none"}}, "invalid_request", "privacy.clipping"),
        ({"evaluation": {"split": 0.9}}, "invalid_request", "evaluation.split"),
        ({"hyperparameters": {"n_epochs": 0}}, "invalid_request", "hyperparameters.n_epochs"),
        ({"hyperparameters": {"epochs": 3}}, "invalid_request", "hyperparameters.epochs"),
        ({"task": {"type": "translation"}}, "task_not_supported", "task.type"),
    ],
)
def test_a_bad_body_is_refused_by_name(
    client: TestClient, make_file: MakeFile, database: Database, body: dict[str, Any], code: str, param: str | None
):
    before = counts(database)
    answer = client.post(JOBS, json={"model": MODEL, "training_file": make_file(), **body})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    if param is not None or code == "unknown_parameter":
        assert error["param"] == param
    assert counts(database) == before


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "must be at least 1, or 'auto'."),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "must be an integer, or 'auto'."),
        (
            {"hyperparameters": {"learning_rate_multiplier": 1e9}},
            "hyperparameters.learning_rate_multiplier",
            "must be at most 1000, or 'auto'.",
        ),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": -1}}}},
            "method.supervised.hyperparameters.batch_size",
            "must be at least 1, or 'auto'.",
        ),
        ({"evaluation": "all"}, "evaluation", "must be an object, or 'none'."),
        ({"evaluation": {"split": 1}}, "evaluation.split", "must be at most 0.5."),
        ({"evaluation": {"splits": 0.1}}, "evaluation.splits", "is not a field of this request."),
        ({"metadata": {"k" * 65: "x"}}, "metadata", "has a key that must have at most 64 characters."),
        ({"privacy": {"target_epsilon": True}}, "privacy.target_epsilon", "must be a number."),
        ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs", "must be a number, or 'auto'."),
        ({"checkpoints": {"count": True}}, "checkpoints.count", "must be a number."),
        ({"privacy": {"max_grad_norm": 1e300}}, "privacy.max_grad_norm", "must be at most 1000000.0."),
        ({"privacy": {"max_grad_norm": 1e-300}}, "privacy.max_grad_norm", "must be at least 1e-06."),
        ({"adaptation": {"type": "lora", "rank": 0}}, "adaptation.rank", "rank must be at least 1."),
        ({"adaptation": {"type": "lora", "rank": 385}}, "adaptation.rank", "at most this base model's width, 384:"),
        (
            {"adaptation": {"type": "attentive_lora", "rank": 4000}},
            "adaptation.rank",
            "at most this base model's width",
        ),
        ({"adaptation": {"type": "lora", "alpha": 1e300}}, "adaptation.alpha", "greater than 0 and at most 1000000."),
        ({"adaptation": {"type": "head", "rank": 2}}, "adaptation.rank", "`head` takes no parameters."),
        ({"model": "gpt-7"}, "model", "GET /v1/base_models lists what jobs can start from."),
        ({"training_file": "file-none"}, "training_file", "GET /v1/files lists those of this project."),
    ],
)
def test_a_refusal_says_which_field_and_what_would_do(
    client: TestClient, make_file: MakeFile, database: Database, body: dict[str, Any], param: str, says: str
):
    before = counts(database)
    answer = client.post(JOBS, json={"model": MODEL, "training_file": make_file(), **body})
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert "errors" not in error
    assert counts(database) == before


@pytest.mark.parametrize("content", [b'{"adaptation": {"type": "lora", "alpha": NaN}}', b'{"seed": Infinity}'])
def test_numbers_that_are_none_are_refused(client: TestClient, make_file: MakeFile, content: bytes):
    body = b'{"model": "all-MiniLM-L6-v2", "training_file": "%s", %s' % (make_file().encode(), content[1:])
    answer = client.post(JOBS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("adaptation.alpha", "seed")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'"x"', b"\xff"])
def test_a_body_that_is_no_object(client: TestClient, content: bytes):
    answer = client.post(JOBS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
