"""Jobs at the unit of their files: units are what is counted, sampled, split and accounted; rows are told to nobody."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from fastapi.testclient import TestClient

from app.jobs.facts import FileFacts
from app.privacy.dp_events import from_json
from app.privacy.plan import GaussianRelease, PrivacyPlan, PrivacyUnit, SampledGaussian
from tests.app.jobs.conftest import MODEL
from tests.app.jobs.test_planning import column, file, plan, refusal

COLUMNS = (column("Sentence"), column("Label", ["neg", "pos"]), column("patient"))
UNIT = {"column": "patient"}


def persons(**changes: Any) -> FileFacts:
    """Two thousand rows of five hundred patients."""
    return file(**{"columns": COLUMNS, "unit_column": "patient", "num_units": 500, **changes})


def other(**changes: Any) -> FileFacts:
    facts = {"id": "file-2", "param": "validation_file", "rows_digest": "e" * 64, "num_rows": 900, "num_units": 70}
    return persons(**{**facts, **changes})


# --- what is planned --------------------------------------------------------------------------------------------------


def test_units_are_sampled_split_and_counted():
    planned = plan(persons(), hyperparameters={"batch_size": 90, "n_epochs": 4})
    assert planned.plan.privacy_unit == PrivacyUnit("patient", 8)
    assert (planned.plan.num_units, planned.plan.num_validation_units) == (450, 50)
    assert (planned.resolved["num_rows"], planned.resolved["num_held_out"]) == (2000, 50)
    head = planned.plan.part("head")
    assert isinstance(head, SampledGaussian)
    assert (head.sample_rate, head.num_steps) == (90 / 450, 20)
    evaluation = planned.plan.part("evaluation")
    assert isinstance(evaluation, GaussianRelease)
    assert evaluation.sensitivity == 1.0


def test_the_certificate_is_for_units():
    """E: the same ε as a file of five hundred single records, from an event that dp-accounting certifies on its own."""
    planned = plan(persons(), privacy={"target_epsilon": 2.0, "target_delta": 1e-5})
    alone = plan(file(num_rows=500), privacy={"target_epsilon": 2.0, "target_delta": 1e-5})
    assert planned.plan.parts == alone.plan.parts
    (charge,) = planned.charges
    assert charge.charge.dp_event == alone.charges[0].charge.dp_event
    parts = {part.name: part for part in planned.plan.parts}
    head = parts["head"]
    expected = [
        dp_event.GaussianDpEvent(parts["centring"].noise_multiplier),
        dp_event.SelfComposedDpEvent(
            dp_event.PoissonSampledDpEvent(1 / 8, dp_event.GaussianDpEvent(head.noise_multiplier)), 160
        ),
        dp_event.GaussianDpEvent(parts["evaluation"].noise_multiplier),
    ]
    accountants = []
    for event in (dp_event.ComposedDpEvent(expected), from_json(charge.charge.dp_event)):
        accountant = PLDAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
        accountants.append(accountant.compose(event).get_epsilon(1e-5))
    assert accountants[0] == pytest.approx(accountants[1], rel=1e-6)
    assert accountants[0] <= 2.0
    assert planned.plan.epsilon == pytest.approx(accountants[0], rel=2e-3)


@pytest.mark.parametrize("asked", [None, {"privacy_unit": UNIT}])
def test_a_job_may_repeat_the_unit(asked: dict[str, Any] | None):
    assert plan(persons(), privacy=asked or {}).plan.privacy_unit.column == "patient"


def test_the_bound_is_declared_and_stands_in_the_plan():
    planned = plan(persons(), privacy={"max_records_per_unit": 3})
    assert planned.plan.privacy_unit.max_records_per_unit == 3
    stored = planned.plan.to_dict()
    assert stored["privacy_unit"] == {"column": "patient", "max_records_per_unit": 3}
    assert PrivacyPlan.from_dict(stored) == planned.plan
    assert planned.plan.digest() != plan(persons()).plan.digest()


def test_plans_over_records_keep_the_form_and_the_digest_they_had():
    stored = plan().plan.to_dict()
    assert stored["privacy_unit"] == {"column": None}
    assert PrivacyPlan.from_dict(stored).digest() == plan().plan.digest()
    with pytest.raises(ValueError, match="bound"):
        PrivacyUnit("patient")
    with pytest.raises(ValueError, match="bound"):
        PrivacyUnit(None, 3)
    with pytest.raises(ValueError, match="at least 1"):
        PrivacyUnit("patient", 0)


def test_a_validation_file_counts_by_its_units():
    planned = plan(persons(), other(), validation_file="file-2")
    assert (planned.plan.num_units, planned.plan.num_validation_units) == (500, 70)
    public = dataclasses.replace(other(unit_column=None, num_units=900), budget=None)
    planned = plan(persons(), public, validation_file="file-2")
    assert (planned.resolved["evaluation"], planned.plan.num_validation_units) == ("public", 900)


@pytest.mark.parametrize(
    ("training", "validation", "body", "code", "param"),
    [
        (persons(), None, {"privacy": {"privacy_unit": {"column": None}}}, "privacy_unit_mismatch", "privacy."),
        (persons(), None, {"privacy": {"privacy_unit": {"column": "Label"}}}, "privacy_unit_mismatch", "privacy."),
        (persons(), other(unit_column=None), {"validation_file": "f"}, "privacy_unit_mismatch", "validation_file"),
        (persons(), other(unit_column="Label"), {"validation_file": "f"}, "privacy_unit_mismatch", "validation_file"),
        (file(columns=COLUMNS), other(), {"validation_file": "f"}, "privacy_unit_mismatch", "validation_file"),
        (persons(), None, {"task": {"columns": {"text": "patient"}}}, "unit_column_in_task", "task.columns"),
        (persons(unit_column="Label"), None, {}, "unit_column_in_task", "task.columns"),
        (persons(num_units=10), None, {}, "too_few_rows", "training_file"),
        # A thousandth is below 1/500 and above 1/2000: units count, not rows.
        (persons(num_units=2000), None, {"privacy": {"target_delta": 1e-3}}, "delta_too_large", "privacy."),
        (
            persons(),
            None,
            {"hyperparameters": {"batch_size": 451}},
            "invalid_hyperparameter",
            "hyperparameters.batch_size",
        ),
        (persons(num_rows=9, num_units=9), other(), {"validation_file": "f"}, "too_few_rows", "training_file"),
    ],
)
def test_what_a_unit_does_not_allow(
    training: FileFacts, validation: FileFacts | None, body: dict[str, Any], code: str, param: str
):
    found = refusal(training, validation, **body)
    assert found[0] == code
    assert found[1].startswith(param)


def test_delta_is_held_against_the_number_of_units():
    assert plan(persons(), privacy={"target_delta": 1e-3}).plan.target_delta == 1e-3
    code, param = refusal(file(), privacy={"target_delta": 1e-3})
    assert (code, param) == ("delta_too_large", "privacy.target_delta")


# --- what is told -----------------------------------------------------------------------------------------------------


def test_a_job_tells_its_unit_and_no_number_of_rows(client: TestClient, make_file: Callable[..., str]):
    columns = [
        {"name": "text", "type": "string", "distinct": 1990, "classes": None, "nulls": None},
        {"name": "label", "type": "string", "distinct": 2, "classes": ["neg", "pos"], "nulls": None},
        {"name": "patient", "type": "string", "distinct": 500, "classes": None, "nulls": None},
    ]
    answers = []
    for rows in (2000, 77_777):
        file_id = make_file(
            columns=columns, unit_column="patient", num_units=500, num_rows=rows, records_per_unit=[[1, 500, rows]]
        )
        body = {"model": MODEL, "training_file": file_id, "seed": 1, "privacy": {"privacy_unit": UNIT}}
        estimate = client.post("/v1/fine_tuning/jobs/estimate", json=body).json()
        job = client.post("/v1/fine_tuning/jobs", json=body).json()
        assert job["privacy"]["privacy_unit"] == UNIT
        assert (job["privacy"]["num_units"], job["privacy"]["max_records_per_unit"]) == (450, 8)
        assert job["evaluation"] == {"metrics": "private", "units": 50, "held_out_rows": None, "validation_rows": None}
        events = client.get(f"/v1/fine_tuning/jobs/{job['id']}/events").text
        for text in (str(estimate), str(job), events, client.get(f"/v1/files/{file_id}").text):
            assert str(rows) not in text
        answers.append((estimate["privacy"], job["privacy"], job["hyperparameters"]))
    assert answers[0] == answers[1]
