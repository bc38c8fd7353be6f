"""Requests to plans: what is inferred, what is refused, what it costs; against accountants called independently."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from app.budgets.repository import Usage
from app.catalog.bases import BASES, BaseModel
from app.catalog.recipes import Phase
from app.errors import ApiError, BudgetExceeded
from app.jobs import planning
from app.jobs.facts import BudgetFacts, Defaults, FileFacts
from app.jobs.planning import Planned
from app.jobs.schemas import CreateJob, parsed
from app.privacy.accountants import pld_epsilon
from app.privacy.dp_events import event_for, from_json
from app.privacy.filter import RenyiBudget
from app.privacy.plan import GaussianRelease, PrivacyPlan, SampledGaussian

BASE = BASES["all-MiniLM-L6-v2"]
DEFAULTS = Defaults(epsilon=3.0, delta=1e-6)


def column(name: str, classes: list[str] | None = None, nulls: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"name": name, "type": "text", "distinct": None, "classes": classes, "nulls": nulls}


def budget(name: str = "pb-1", limit: float = 10.0, used: float = 0.0, is_open: bool = True) -> BudgetFacts:
    accounting = RenyiBudget.create(limit, 1e-6)
    return BudgetFacts(name, accounting, Usage(accounting.capacity * used, 0.0), is_open)


def file(**changes: Any) -> FileFacts:
    facts = FileFacts(
        id="file-1",
        param="training_file",
        num_rows=2000,
        rows_digest="d" * 64,
        columns=(column("Sentence"), column("Label", ["neg", "pos"])),
        budget=budget(),
    )
    return dataclasses.replace(facts, **changes)


def validation(**changes: Any) -> FileFacts:
    return file(**{"id": "file-2", "param": "validation_file", "num_rows": 300, "rows_digest": "e" * 64, **changes})


def plan(training: FileFacts | None = None, validation: FileFacts | None = None, **body: Any) -> Planned:
    request = parsed(CreateJob.model_validate({"model": BASE.id, "training_file": "file-1", **body}))
    return planning.plan(request, BASE, training or file(), validation, DEFAULTS)


def refusal(training: FileFacts | None = None, validation: FileFacts | None = None, **body: Any) -> tuple[str, Any]:
    with pytest.raises(ApiError) as refused:
        plan(training, validation, **body)
    return refused.value.code, refused.value.param


# --- what a plain request comes to -----------------------------------------------------------------------------------


def test_a_plain_request_is_private_under_the_defaults():
    planned = plan()
    assert (planned.plan.target_epsilon, planned.plan.target_delta) == (3.0, 1e-6)
    assert planned.resolved["task"] == {
        "type": "text_classification",
        "columns": {"text": "Sentence", "label": "Label"},
        "labels": ["neg", "pos"],
        "labels_source": "file",
        "max_length": 128,
        "options": {},
    }
    assert (planned.resolved["evaluation"], planned.resolved["num_held_out"]) == ("private", 200)
    assert planned.plan.num_units == 1800
    assert planned.resolved["adaptation"] == {"type": "attentive_head", "num_layers": 4}
    assert planned.hyperparameters == {"n_epochs": 30, "batch_size": 450, "learning_rate_multiplier": 1.0}
    assert [Phase.from_dict(phase).name for phase in planned.resolved["phases"]] == ["head"]


def test_the_certificate_covers_training_and_evaluation_together():
    """E: the stored event is that of the plan's parts, and an accountant called here agrees with the plan's ε."""
    planned = plan(privacy={"target_epsilon": 2.0, "target_delta": 1e-5})
    (charge,) = planned.charges
    event = from_json(charge.charge.dp_event)
    assert event == event_for(planned.plan)
    assert [part.name for part in planned.plan.parts] == ["centring", "head", "evaluation"]
    epsilon = pld_epsilon(event, 1e-5).epsilon
    assert 1.99 < epsilon <= 2.0 + 1e-9
    assert planned.plan.epsilon == pytest.approx(epsilon, rel=2e-3)
    assert charge.charge.rho == RenyiBudget.create(10.0, 1e-6).rho_of(event)
    without = event_for([part for part in planned.plan.parts if part.name != "evaluation"])
    assert pld_epsilon(without, 1e-5).epsilon < epsilon


def test_a_plan_survives_its_storage():
    planned = plan()
    assert PrivacyPlan.from_dict(planned.plan.to_dict()) == planned.plan
    assert PrivacyPlan.from_dict(planned.plan.to_dict()).digest() == planned.plan.digest()


def test_the_same_request_plans_the_same():
    assert plan().plan.digest() == plan().plan.digest()


@pytest.mark.parametrize("base", [BASE, dataclasses.replace(BASE, hidden_size=1024, num_layers=24)])
@pytest.mark.parametrize("num_units", [900, 5_000, 50_000])
def test_how_many_rows_persons_have_decides_nothing(base: BaseModel, num_units: int):
    request = parsed(CreateJob.model_validate({"model": base.id, "training_file": "file-1"}))
    few, many = (
        planning.plan(
            request,
            base,
            file(num_rows=rows, unit_column="patient", num_units=num_units),
            None,
            DEFAULTS,
        )
        for rows in (num_units, 10**8)
    )
    assert few.plan == many.plan
    assert {key: value for key, value in few.resolved.items() if value != many.resolved[key]}.keys() == {"num_rows"}


def test_hyperparameters_in_either_of_the_wires_places():
    wanted = {"n_epochs": 8, "batch_size": 90, "learning_rate_multiplier": 0.5}
    deprecated = plan(hyperparameters=wanted)
    current = plan(method={"type": "supervised", "supervised": {"hyperparameters": wanted}})
    assert deprecated.plan.digest() == current.plan.digest()
    assert deprecated.hyperparameters == wanted
    main = deprecated.plan.parts[1]
    assert isinstance(main, SampledGaussian)
    assert (main.sample_rate, main.num_steps) == (90 / 1800, 160)
    (phase,) = deprecated.resolved["phases"]
    assert phase["learning_rate"] == plan().resolved["phases"][0]["learning_rate"] * 0.5


def test_an_adaptation_that_was_asked_for():
    planned = plan(adaptation={"type": "lora", "rank": 4}, privacy={"clipping": "flat", "max_grad_norm": 0.5})
    assert planned.resolved["adaptation"] == {"type": "lora", "rank": 4, "alpha": 16.0, "targets": []}
    assert planned.resolved["auto"] == {"adaptation": "requested"}
    assert all(
        (part.clipping, part.max_grad_norm) == ("flat", 0.5)
        for part in planned.plan.parts
        if isinstance(part, SampledGaussian)
    )


# --- whose data, whose budget ----------------------------------------------------------------------------------------


def test_a_public_validation_file_is_exact_and_free():
    planned = plan(file(), validation(budget=None))
    assert planned.resolved["evaluation"] == "public"
    assert [part.name for part in planned.plan.parts] == ["centring", "head"]
    assert (planned.plan.num_units, planned.resolved["num_held_out"]) == (2000, 0)
    assert [charge.charge.budget_id for charge in planned.charges] == ["pb-1"]


def test_a_private_validation_file_of_the_same_budget_is_composed_in():
    planned = plan(file(), validation())
    (charge,) = planned.charges
    assert charge.datasets == ("training", "validation")
    assert from_json(charge.charge.dp_event) == event_for(planned.plan, ("training", "validation"))
    assert from_json(charge.charge.dp_event) != event_for(planned.plan)
    assert pld_epsilon(event_for(planned.plan, ("training", "validation")), 1e-6).epsilon <= 3.0


def test_a_private_validation_file_of_another_budget_is_charged_there():
    planned = plan(file(), validation(budget=budget("pb-2")), evaluation={"epsilon_share": 0.2})
    charges = {charge.charge.budget_id: charge for charge in planned.charges}
    evaluation = planned.plan.part("evaluation")
    assert isinstance(evaluation, GaussianRelease)
    assert evaluation.dataset == "validation"
    assert from_json(charges["pb-2"].charge.dp_event) == event_for([evaluation], ("validation",))
    assert from_json(charges["pb-1"].charge.dp_event) == event_for(planned.plan)
    assert pld_epsilon(event_for([evaluation], ("validation",)), 1e-6).epsilon == pytest.approx(0.6, rel=1e-2)
    assert planned.plan.epsilon == pytest.approx(3.0, rel=3e-3)  # the training budget's own


def test_no_evaluation_leaves_all_rows_and_all_epsilon_to_training():
    planned = plan(evaluation="none")
    assert (planned.plan.num_units, planned.resolved["evaluation"]) == (2000, "none")
    noise = [p.noise_multiplier for p in planned.plan.parts if isinstance(p, SampledGaussian)]
    assert noise < [p.noise_multiplier for p in plan().plan.parts if isinstance(p, SampledGaussian)]


def test_an_epsilon_of_the_evaluations_own():
    planned = plan(evaluation={"epsilon": 0.5, "split": 0.2})
    assert planned.plan.num_units == 1600
    assert pld_epsilon(event_for([planned.plan.part("evaluation")]), 1e-6).epsilon == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize("privacy", [{"mechanism": "none"}, {}])
def test_a_public_file_charges_nothing(privacy: dict[str, str]):
    planned = plan(file(budget=None), privacy=privacy)
    assert planned.charges == ()
    assert planned.resolved["evaluation"] == "public"
    assert planned.plan.mechanism == privacy.get("mechanism", "dp_sgd")
    assert all((part.noise_multiplier > 0.0) == (privacy == {}) for part in planned.plan.parts)


def test_a_public_training_file_with_a_private_validation_file():
    planned = plan(file(budget=None), validation(budget=budget("pb-2")))
    (charge,) = planned.charges
    assert (charge.charge.budget_id, charge.datasets) == ("pb-2", ("validation",))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "code", "param"),
    [
        (file(columns=(column("x"), column("y"))), "column_not_found", "task.columns.text"),
        (file(columns=(column("text"), column("y", ["a", "b"]))), "column_not_found", "task.columns.label"),
        (file(columns=(column("text"), column("label", ["a"]))), "one_class_only", "training_file"),
        (file(columns=(column("text"), column("label"))), "too_many_classes", "task.columns.label"),
        (file(num_rows=10), "too_few_rows", "training_file"),
        (file(num_rows=1_000_000), "delta_too_large", "privacy.target_delta"),
        (file(budget=budget(is_open=False)), "budget_closed", "training_file"),
    ],
)
def test_files_that_cannot_be_trained_on(training: FileFacts, code: str, param: str):
    assert refusal(training) == (code, param)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"privacy": {"target_epsilon": 0}}, "invalid_epsilon", "privacy.target_epsilon"),
        ({"privacy": {"target_epsilon": -1}}, "invalid_epsilon", "privacy.target_epsilon"),
        ({"privacy": {"target_epsilon": 1e6}}, "invalid_epsilon", "privacy.target_epsilon"),
        ({"privacy": {"target_delta": 1 / 2000}}, "delta_too_large", "privacy.target_delta"),
        ({"privacy": {"target_delta": 0}}, "delta_too_small", "privacy.target_delta"),
        ({"privacy": {"mechanism": "none"}}, "mechanism_not_allowed", "privacy.mechanism"),
        (
            {"privacy": {"clipping": "automatic", "max_grad_norm": 0.5}},
            "invalid_max_grad_norm",
            "privacy.max_grad_norm",
        ),
        (
            {"adaptation": {"type": "lora"}, "privacy": {"max_grad_norm": 0.5}},
            "invalid_max_grad_norm",
            "privacy.max_grad_norm",
        ),
        ({"privacy": {"privacy_unit": {"column": "patient"}}}, "privacy_unit_mismatch", "privacy.privacy_unit"),
        ({"privacy": {"max_records_per_unit": 4}}, "invalid_request", "privacy.max_records_per_unit"),
        ({"task": {"type": "translation"}}, "task_not_supported", "task.type"),
        ({"task": {"columns": {"text": "nope"}}}, "column_not_found", "task.columns.text"),
        ({"task": {"columns": {"text": "Label"}}}, "column_not_found", "task.columns"),
        ({"task": {"columns": {"image": "Label"}}}, "unknown_parameter", "task.columns"),
        ({"task": {"labels": ["neg", "other"]}}, "label_not_declared", "training_file"),
        ({"task": {"labels": ["neg", "neg"]}}, "invalid_labels", "task.labels"),
        ({"task": {"max_length": 513}}, "invalid_max_length", "task.max_length"),
        ({"adaptation": {"type": "magic"}}, "adaptation_not_supported", "adaptation.type"),
        ({"adaptation": {"type": "lora", "depth": 3}}, "unknown_parameter", "adaptation.depth"),
        ({"adaptation": {"type": "lora", "rank": 0}}, "invalid_adaptation", "adaptation.rank"),
        ({"adaptation": {"type": "lora", "rank": "many"}}, "invalid_adaptation", "adaptation.rank"),
        ({"hyperparameters": {"batch_size": 1801}}, "invalid_hyperparameter", "hyperparameters.batch_size"),
        ({"hyperparameters": {"batch_size": 1, "n_epochs": 1000}}, "too_many_steps", "hyperparameters"),
        ({"evaluation": {"epsilon": 3.0}}, "invalid_evaluation", "evaluation.epsilon"),
        ({"evaluation": {"epsilon": 1.0, "epsilon_share": 0.1}}, "invalid_evaluation", "evaluation.epsilon"),
        ({"method": {"type": "dpo", "dpo": {}}}, "method_not_supported", "method.type"),
        ({"integrations": [{"type": "wandb"}]}, "not_supported", "integrations"),
        ({"colour": "red"}, "unknown_parameter", "colour"),
        ({"privacy": {"loss_curve": False, "loss_bound": 2.0}}, "invalid_request", "privacy.loss_bound"),
        ({"optimizer": {"type": "adamw", "momentum": 0.5}}, "invalid_optimizer", "optimizer.momentum"),
        ({"optimizer": {"type": "sgd"}}, "invalid_optimizer", "optimizer.learning_rate"),
        (
            {"optimizer": {"learning_rate": 0.1}, "hyperparameters": {"learning_rate_multiplier": 2.0}},
            "invalid_optimizer",
            "optimizer.learning_rate",
        ),
        ({"schedule": {"type": "cosine", "warmup_steps": 160}}, "invalid_schedule", "schedule.warmup_steps"),
    ],
)
def test_requests_that_cannot_be(body: dict[str, Any], code: str, param: str):
    assert refusal(**body) == (code, param)


@pytest.mark.parametrize(
    ("other", "body", "code", "param"),
    [
        (validation(columns=(column("Sentence"),)), {}, "column_not_found", "validation_file"),
        (
            validation(columns=(column("Sentence"), column("Label", ["neg", "new"]))),
            {},
            "label_not_declared",
            "validation_file",
        ),
        (validation(), {"evaluation": "none"}, "invalid_evaluation", "evaluation"),
        (validation(), {"evaluation": {"split": 0.2}}, "invalid_evaluation", "evaluation.split"),
        (validation(budget=budget("pb-2", is_open=False)), {}, "budget_closed", "training_file"),
    ],
)
def test_validation_files_that_do_not_fit(other: FileFacts, body: dict[str, Any], code: str, param: str):
    assert refusal(file(), other, **body) == (code, param)


def test_no_refusal_tells_a_value():
    """A column name may be a row (a file without a header), a class is private unless declared."""
    secret = "zx81-canary"
    for columns, body in (
        ((column(secret), column(secret + "2")), {}),
        ((column("text"), column("label", ["a", secret])), {"task": {"labels": ["a", "b"]}}),
        ((column("text"), column("label", [secret])), {}),
    ):
        with pytest.raises(ApiError) as refused:
            plan(file(columns=columns), **body)
        assert secret not in f"{refused.value.message} {refused.value.param} {refused.value.extra}"


def test_an_evaluation_that_leaves_nothing_is_refused_by_its_cost():
    assert refusal(privacy={"target_epsilon": 0.001}, evaluation={"epsilon_share": 0.999})[0] == "epsilon_too_small"


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [0.5, 0.9, 0.99])
def test_the_nearest_plan_that_is_offered_fits(used: float):
    training = file(budget=budget(used=used))
    with pytest.raises(BudgetExceeded) as refused:
        plan(training, privacy={"target_epsilon": 9.0})
    assert refused.value.code == "budget_exceeded"
    assert 0.0 < refused.value.extra["epsilon_remaining"] < 10.0
    nearest = refused.value.extra["nearest_plan"]
    offered = plan(training, privacy={"target_epsilon": nearest["target_epsilon"]})
    assert offered.plan.epsilon <= nearest["target_epsilon"]
    with pytest.raises(BudgetExceeded):  # and it is near: a fifth more does not fit
        plan(training, privacy={"target_epsilon": nearest["target_epsilon"] * 1.2})


def test_an_untouched_budget_takes_a_first_plan_up_to_its_limit_by_pld():
    small = budget(limit=3.0)
    planned = plan(file(budget=small))
    (charge,) = planned.charges
    assert charge.charge.rho > small.accounting.capacity
    assert charge.charge.first_plan_epsilon is not None
    assert charge.charge.first_plan_epsilon <= 3.0
    with pytest.raises(BudgetExceeded) as refused:
        plan(file(budget=small), privacy={"target_epsilon": 3.2})
    assert refused.value.extra["nearest_plan"]["target_epsilon"] == 3.0


def test_nothing_fits_a_spent_budget():
    with pytest.raises(BudgetExceeded) as refused:
        plan(file(budget=budget(used=1.0)))
    assert refused.value.extra["nearest_plan"] is None
    assert refused.value.extra["epsilon_remaining"] == 0.0


def test_a_spent_validation_budget_refuses_too():
    with pytest.raises(BudgetExceeded) as refused:
        plan(file(), validation(budget=budget("pb-2", used=0.9999)))
    assert refused.value.extra["privacy_budget"] == "pb-2"
