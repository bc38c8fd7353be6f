"""The release gate: what is not on the list stays inside."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from app.db.session import Database
from app.events import repository as events
from app.events.tables import JobEvent
from app.privacy import loss_curve
from app.privacy.plan import LossSum, PrivacyPlan, SampledGaussian
from worker import metrics_gate, reporter
from worker.trainer.messages import Progress

SECRET = "Mrs Patient lives at Secret Street 1"


@pytest.fixture
def recorded(database: Database, project_id: str) -> Any:
    """Records one event; the rows of the job's history, and what was logged."""
    claimed = SimpleNamespace(project_id=project_id, job_id="ftjob-1")

    def record(code: str, data: dict[str, Any]) -> tuple[list[JobEvent], str]:
        with capture_logs() as logs, database.writing() as session:
            reporter.record(session, claimed, code, data)  # type: ignore[arg-type]
        with database.reading() as session:
            return list(session.scalars(events.readable(project_id, "ftjob-1"))), str(logs)

    return record


def test_a_cleared_code_becomes_an_event_in_fixed_words(recorded: Any) -> None:
    data = {"step": 3, "num_steps": 10, "phase": "main", "executed": {"main": 3}}
    (event,), _ = recorded("progress", data)
    assert (event.code, event.type, event.level, event.message) == ("progress", "metrics", "info", "Step 3 of 10.")
    assert event.data == data


def test_an_unknown_code_is_dropped_and_not_even_logged_by_name(recorded: Any) -> None:
    rows, logs = recorded(SECRET, {"loss": 0.123456})
    assert rows == []
    assert "event_dropped" in logs
    assert SECRET not in logs
    assert "0.123456" not in logs


def test_a_field_that_is_not_listed_is_dropped_from_a_cleared_event(recorded: Any) -> None:
    (event,), logs = recorded("checkpoint_committed", {"step": 3, "loss": 0.123456, SECRET: 1})
    assert event.data == {"step": 3}
    assert "event_fields_dropped" in logs
    assert "0.123456" not in logs
    assert SECRET not in logs


@pytest.mark.parametrize("value", [SECRET, None, True, math.nan, math.inf, [1], {"a": 1}])
def test_an_event_whose_field_is_of_another_kind_is_dropped(recorded: Any, value: Any) -> None:
    rows, logs = recorded("checkpoint_committed", {"step": value})
    assert rows == []
    assert SECRET not in logs


def test_names_in_progress_are_names_of_phases(recorded: Any) -> None:
    rows, _ = recorded("progress", {"step": 1, "num_steps": 2, "phase": SECRET, "executed": {"main": 1}})
    assert rows == []
    rows, _ = recorded("progress", {"step": 1, "num_steps": 2, "phase": "main", "executed": {SECRET: 1}})
    assert rows == []


def test_progress_is_thinned_to_a_few_events_and_the_last_is_among_them() -> None:
    thinned = reporter.ProgressEvents()
    due = [step for step in range(1, 5001) if thinned.due(Progress(step, 5000, "main", {"main": step}))]
    assert len(due) <= reporter.PROGRESS_EVENTS + 1
    assert due[0] == 1
    assert due[-1] == 5000


def test_the_first_step_of_a_phase_is_told_at_once_and_no_step_twice() -> None:
    """A trainer that waits before a phase tells where it stands."""
    thinned = reporter.ProgressEvents()
    told = [("centring", 1), ("head", 1), ("head", 2), ("head", 3), ("main", 3), ("main", 4), ("main", 5)]
    due = [step for phase, step in told if thinned.due(Progress(step, 5000, phase, {phase: step}))]
    assert due == [1, 2, 3]


METRICS = {
    "released": "private",
    "method": "whatever",
    "noise_std": 2.5,
    "dataset": "held_out_split",
    "num_units": 100,
    "averaged_over": "units",
    "labels": ["a", "b"],
    "accuracy": 0.9,
    "accuracy_interval_95": [0.8, 1.0],
    "precision_macro": 0.9,
    "recall_macro": 0.9,
    "f1_macro": 0.9,
    "f1_micro": 0.9,
    "precision_per_class": [0.9, 0.9],
    "recall_per_class": [0.9, 0.9],
    "f1_per_class": [0.9, None],
    "confusion_matrix": [[50.5, 1.0], [0.0, 48.1]],
}


def test_metrics_pass_by_name_and_kind_only() -> None:
    offered = {**METRICS, "training_loss": 0.1, "accuracy_exact": 0.91, "labels": [SECRET], "method": SECRET}
    released = metrics_gate.cleared_metrics(offered, "private", "text_classification", ("a", "b"))
    assert released == {**METRICS, "method": released["method"]}
    assert SECRET not in str(released)


@pytest.mark.parametrize("evaluation", ["public", "none"])
def test_metrics_of_another_kind_than_planned_are_refused(evaluation: str) -> None:
    with pytest.raises(metrics_gate.NotReleased):
        metrics_gate.cleared_metrics(METRICS, evaluation, "text_classification", ("a", "b"))


def test_without_an_evaluation_no_number_is_released() -> None:
    released = metrics_gate.cleared_metrics(
        {"released": "none", "accuracy": 0.9}, "none", "text_classification", ("a", "b")
    )
    assert "accuracy" not in released


def test_a_loss_curve_leaves_only_as_the_plan_has_it() -> None:
    part = SampledGaussian("head", 0.5, 16, 2.0, 1.0, "automatic", loss=LossSum(2.0, 1 / 64))
    plan = PrivacyPlan("dp_sgd", 100, (part,), target_epsilon=1.0, target_delta=1e-5)
    curve = [
        loss_curve.described(plan, point) for point in loss_curve.points(plan, {"head": [0.5] * 16}, {"head": 1.0})
    ]
    assert metrics_gate.cleared_curve(None, plan, {"head": 16}) == {}
    assert metrics_gate.cleared_curve(curve, plan, {"head": 16}) == {"train_loss_curve": curve}
    with pytest.raises(metrics_gate.NotReleased):
        metrics_gate.cleared_curve(curve, plan, {"head": 15})
    for change in (
        {"step": 3},
        {"phase": "main"},
        {"train_loss": SECRET},
        {"train_loss_noise_std": 0.0},
        {"train_loss_interval_95": [0.0, SECRET]},
        {"exact": 0.4},
    ):
        with pytest.raises(metrics_gate.NotReleased):
            metrics_gate.cleared_curve([{**curve[0], **change}], plan, {"head": 16})
    bare = PrivacyPlan(
        "dp_sgd", 100, (SampledGaussian("head", 0.5, 16, 2.0, 1.0, "flat"),), target_epsilon=1.0, target_delta=1e-5
    )
    with pytest.raises(metrics_gate.NotReleased):
        metrics_gate.cleared_curve(curve, bare, {"head": 16})


def test_entities_are_scored_on_public_data_only_and_by_declared_types() -> None:
    tags = ("O", "B-PER", "I-PER", "B-LOC")
    offered = {"accuracy": 0.5, "entity_f1": 0.5, "entity_f1_per_type": {"PER": 0.5, "LOC": 0.0}}
    public = metrics_gate.cleared_metrics({"released": "public", **offered}, "public", "token_classification", tags)
    assert offered.items() <= public.items()
    private = metrics_gate.cleared_metrics({"released": "private", **offered}, "private", "token_classification", tags)
    assert private["accuracy"] == 0.5
    assert not {"entity_f1", "entity_f1_per_type"} & private.keys()
    offered["entity_f1_per_type"] = {SECRET: 0.5}
    public = metrics_gate.cleared_metrics({"released": "public", **offered}, "public", "token_classification", tags)
    assert "entity_f1_per_type" not in public


def test_what_a_model_wrote_is_scored_on_public_data_only() -> None:
    offered = {"loss": 1.5, "bleu": 20.0, "chrf": 40.0, "rougeL": 0.4, "generated_rows": 12}
    withheld = {"bleu": "public_data_only", SECRET: "noise"}
    public = metrics_gate.cleared_metrics({"released": "public", **offered}, "public", "summarization", ())
    assert offered.items() <= public.items()
    private = metrics_gate.cleared_metrics({"released": "private", **offered}, "private", "summarization", ())
    assert private["loss"] == 1.5
    assert not {"bleu", "chrf", "rougeL", "generated_rows"} & private.keys()
    named = {"released": "private", "not_released": {"bleu": "public_data_only"}}
    assert metrics_gate.cleared_metrics(named, "private", "summarization", ())["not_released"] == named["not_released"]
    named["not_released"] = withheld
    assert "not_released" not in metrics_gate.cleared_metrics(named, "private", "summarization", ())
    other = metrics_gate.cleared_metrics({"released": "public", **offered}, "public", "chat", ())
    assert "bleu" not in other
