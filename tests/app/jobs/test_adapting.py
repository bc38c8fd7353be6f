"""What of a base an adaptation finds to train is known before anything is spent."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from app.catalog.bases import BaseModel
from app.errors import ApiError
from app.jobs import planning
from app.jobs.planning import Planned
from app.jobs.schemas import CreateJob, parsed
from app.models.catalog import find_base
from app.settings import Settings
from tests.app.jobs.test_planning import BASE, DEFAULTS, budget, column, file
from tests.app.jobs.test_planning import plan as plan_of
from tests.app.jobs.test_planning_generative import base as base_of

NAMES = (
    "embeddings.word_embeddings.weight",
    "encoder.layer.0.output.dense.weight",
    "encoder.layer.10.output.dense.weight",
)


def plan(base: BaseModel, *patterns: str, **body: Any) -> Planned:
    adaptation = {"type": "freeze", "patterns": list(patterns)}
    request = {"model": base.id, "training_file": "file-1", "adaptation": adaptation, **body}
    return planning.plan(parsed(CreateJob.model_validate(request)), base, file(), None, DEFAULTS)


def refusal(base: BaseModel, *patterns: str, **body: Any) -> tuple[str, str | None]:
    with pytest.raises(ApiError) as refused:
        plan(base, *patterns, **body)
    return refused.value.code, refused.value.param


def test_with_little_noise_the_blocks_are_adapted_too() -> None:
    wide, little = file(budget=budget(limit=100.0)), {"target_epsilon": 28.0}
    planned = plan_of(wide, privacy=little)
    assert planned.resolved["auto"] == {"adaptation": "little_noise"}
    assert planned.resolved["adaptation"] == {"type": "attentive_lora", "num_layers": 4, "rank": 16, "alpha": 32.0}
    assert [part.name for part in planned.plan.parts] == ["centring", "head", "main", "temperature", "evaluation"]
    assert planned.hyperparameters == {"n_epochs": 30, "batch_size": 900, "learning_rate_multiplier": 1.0}
    for own in ({"optimizer": {"learning_rate": 0.2}}, {"schedule": {"type": "linear"}}):
        assert plan_of(wide, privacy=little, **own).resolved["auto"] == {"adaptation": "few_units"}
    assert plan_of(privacy={"target_epsilon": 8.0}).resolved["auto"] == {"adaptation": "few_units"}


def test_an_attentive_head_on_a_model_that_pools_keeps_all_blocks() -> None:
    """The weights of such a model end with its pooling layer; a plan that named fewer blocks would name others."""
    pooling = dataclasses.replace(BASE, pools=True, num_layers=4)
    assert plan(BASE, adaptation={"type": "attentive_head"}).resolved["adaptation"]["num_layers"] == 4
    assert plan(BASE, adaptation={"type": "attentive_head", "num_layers": 2}).resolved["adaptation"]["num_layers"] == 2
    for asked in ({}, {"num_layers": 4}):
        resolved = plan(pooling, adaptation={"type": "attentive_head", **asked}).resolved
        assert (
            resolved["adaptation"]
            == resolved["phases"][-1]["adaptation"]
            == {"type": "attentive_head", "num_layers": 4}
        )
    fewer = refusal(pooling, adaptation={"type": "attentive_head", "num_layers": 3})
    assert fewer == ("adaptation_not_supported", "adaptation.type")


def test_patterns_are_of_the_plan() -> None:
    named = dataclasses.replace(BASE, parameter_names=NAMES, num_layers=11)
    resolved = plan(named, "embeddings.*", "layer.0.*").resolved
    assert resolved["adaptation"] == {"type": "freeze", "patterns": ["embeddings.*", "layer.0.*"]}
    assert resolved["phases"][-1]["adaptation"]["type"] == "freeze"
    assert "parameter_names" not in resolved["base"]


@pytest.mark.parametrize(
    ("patterns", "code"),
    [
        ((), "freeze_matches_nothing"),
        (("embedding.*",), "freeze_matches_nothing"),
        (("embeddings.*", "layer.1.*"), "freeze_matches_nothing"),  # each of them: it is not a beginning of layer.10
        (("dings.*",), "freeze_matches_nothing"),  # a name is matched from a dot on
        (("embeddings.*", "encoder.*"), "freeze_matches_everything"),
        (("*",), "freeze_matches_everything"),
    ],
)
def test_patterns_of_nothing_and_of_everything_are_refused(patterns: tuple[str, ...], code: str) -> None:
    named = dataclasses.replace(BASE, parameter_names=NAMES, num_layers=11)
    assert refusal(named, *patterns) == (code, "adaptation.patterns")


def test_without_names_nothing_is_frozen_blindly() -> None:
    assert refusal(dataclasses.replace(BASE, parameter_names=()), "embeddings.*")[0] == "adaptation_not_supported"


#: As a checkpoint of masked language modeling has them, whatever the task.
BERT = (
    *(f"bert.{name}" for name in NAMES),
    "bert.pooler.dense.weight",
    "cls.predictions.bias",
    "cls.predictions.transform.dense.weight",
    "cls.seq_relationship.weight",
)
MASKED_LM = {"type": "masked_lm", "columns": {"text": "Sentence"}}


@pytest.mark.parametrize("pattern", ["cls.*", "pooler.*", "cls.predictions.transform.*", "layer.10.*"])
def test_patterns_of_weights_that_the_task_leaves_out_are_refused(pattern: str) -> None:
    """The last: a block that the configuration does not count is none of the model's."""
    bert = dataclasses.replace(BASE, parameter_names=BERT, num_layers=10)
    with pytest.raises(ApiError) as refused:
        plan(bert, "embeddings.*", pattern)
    assert (refused.value.code, refused.value.param) == ("freeze_matches_nothing", "adaptation.patterns")
    assert "place 1" in refused.value.message
    assert "`text_classification` leaves out" in refused.value.message


def test_what_one_task_leaves_out_another_trains() -> None:
    bert = dataclasses.replace(BASE, parameter_names=BERT, num_layers=11, tasks=(*BASE.tasks, "masked_lm"))
    resolved = plan(bert, "cls.*", "embeddings.*", task=MASKED_LM).resolved
    assert resolved["adaptation"]["patterns"] == ["cls.*", "embeddings.*"]


@pytest.mark.parametrize(
    ("patterns", "task"),
    [
        (("bert.embeddings.*", "bert.encoder.*"), None),  # `cls.*` and the pooler are left, and left out
        (("embeddings.*", "encoder.*", "cls.predictions.*"), MASKED_LM),  # the pooler and the other head
    ],
)
def test_patterns_that_leave_only_what_the_task_leaves_out_are_refused(patterns: tuple[str, ...], task: Any) -> None:
    bert = dataclasses.replace(BASE, parameter_names=BERT, num_layers=11, tasks=(*BASE.tasks, "masked_lm"))
    body = {} if task is None else {"task": task}
    assert refusal(bert, *patterns, **body) == ("freeze_matches_everything", "adaptation.patterns")


def test_lora_and_bitfit_find_only_what_the_task_trains() -> None:
    weights = ("bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight", "bert.pooler.dense.bias")
    bert = dataclasses.replace(BASE, parameter_names=weights)
    assert refusal(bert, adaptation={"type": "lora", "targets": ["dense"]})[0] == "lora_matches_nothing"
    assert refusal(bert, adaptation={"type": "bitfit"})[0] == "adaptation_not_supported"


def test_weights_that_are_no_parameters_do_not_count() -> None:
    names = ("model.shared.weight", "final_logits_bias")
    bart = base_of("bart", parameter_names=names)
    assert refusal(
        bart, "shared.*", task={"type": "text_to_text", "columns": {"source": "Sentence", "target": "Label"}}
    ) == (
        "freeze_matches_everything",
        "adaptation.patterns",
    )


@pytest.mark.parametrize("patterns", [[""], ["x" * 201], ["a.*"] * 65, "embeddings.*", [7]])
def test_patterns_are_short_and_few(patterns: Any) -> None:
    body = {"model": "m", "training_file": "f", "adaptation": {"type": "freeze", "patterns": patterns}}
    with pytest.raises(ApiError) as refused:
        parsed(CreateJob.model_validate(body))
    assert refused.value.code == "invalid_adaptation"


def test_names_of_a_packages_weights_are_known(settings: Settings) -> None:
    base = find_base(settings, "all-MiniLM-L6-v2")
    assert base is not None
    assert "embeddings.word_embeddings.weight" in base.parameter_names
    assert plan(base, "embeddings.*").resolved["adaptation"]["patterns"] == ["embeddings.*"]


@pytest.mark.parametrize(
    ("targets", "code"), [(["output.dense"], None), (["dense"], None), (["query"], "lora_matches_nothing")]
)
def test_targets_of_lora_are_matrices_that_there_are(targets: list[str], code: str | None) -> None:
    named = dataclasses.replace(BASE, parameter_names=NAMES, num_layers=11)
    adaptation = {"type": "lora", "targets": targets}
    body = parsed(CreateJob.model_validate({"model": "m", "training_file": "f", "adaptation": adaptation}))
    if code is None:
        assert planning.plan(body, named, file(), None, DEFAULTS).resolved["adaptation"]["targets"] == targets
        return
    with pytest.raises(ApiError) as refused:
        planning.plan(body, named, file(), None, DEFAULTS)
    assert (refused.value.code, refused.value.param) == (code, "adaptation.targets")


def images(family: str, **changes: Any) -> BaseModel:
    norm = [f"encoder.0.norm.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    return base_of(family, parameter_names=("encoder.0.conv.weight", "encoder.1.conv.weight", *norm), **changes)


def plan_images(base: BaseModel, **adaptation: Any) -> Planned:
    columns = ({**column("image"), "type": "image"}, column("label", ["cat", "dog"]))
    body = {"model": base.id, "training_file": "file-1", "adaptation": adaptation}
    return planning.plan(parsed(CreateJob.model_validate(body)), base, file(columns=columns), None, DEFAULTS)


@pytest.mark.parametrize("family", ["resnet", "efficientnet", "resnet_group_norm", "efficientnet_group_norm"])
@pytest.mark.parametrize(
    "adaptation",
    [
        {"type": "full"},
        {"type": "last_layers", "num_layers": 1},
        {"type": "freeze", "patterns": ["encoder.1.*", "norm.weight"]},
        {"type": "bitfit"},
    ],
    ids=lambda adaptation: adaptation["type"],
)
def test_batch_norm_is_replaced_where_norms_train(family: str, adaptation: dict[str, Any]) -> None:
    asked = {**adaptation, "batch_norm": "group_norm"}
    resolved = plan_images(images(family), **asked).resolved
    assert resolved["adaptation"] == resolved["phases"][-1]["adaptation"] == asked
    for kept in ({}, {"batch_norm": "frozen"}):
        if family.endswith("group_norm") or adaptation["type"] in ("full", "last_layers"):
            assert plan_images(images(family), **adaptation, **kept).resolved["adaptation"] == adaptation
            continue
        with pytest.raises(ApiError) as refused:  # the pattern, and every bias, is of norms that never train
            plan_images(images(family), **adaptation, **kept)
        assert refused.value.code in ("freeze_matches_nothing", "adaptation_not_supported")


@pytest.mark.parametrize(
    ("family", "adaptation", "code"),
    [
        ("resnet", {"type": "head"}, "batch_norm_not_trained"),
        ("resnet", {"type": "lora"}, "batch_norm_not_trained"),
        ("resnet", {"type": "attentive_head"}, "batch_norm_not_trained"),
        ("resnet", {"type": "auto"}, "batch_norm_not_trained"),
        ("resnet", {}, "batch_norm_not_trained"),
        ("resnet", {"type": "freeze", "patterns": ["encoder.0.*"]}, "batch_norm_not_trained"),
        ("resnet", {"type": "full", "batch_norm": "layer_norm"}, "invalid_adaptation"),
        ("resnet", {"type": "full", "batch_norm": True}, "invalid_adaptation"),
        ("bit", {"type": "full"}, "batch_norm_missing"),
        ("vit", {"type": "last_layers"}, "batch_norm_missing"),
    ],
)
def test_batch_norm_that_nothing_would_make_up_for_is_refused(
    family: str, adaptation: dict[str, Any], code: str
) -> None:
    with pytest.raises(ApiError) as refused:
        plan_images(images(family), **{"batch_norm": "group_norm", **adaptation})
    assert (refused.value.code, refused.value.param) == (code, "adaptation.batch_norm")


def test_a_base_of_the_same_classes_is_centred_already():
    def parts(labels: tuple[str, ...], task: str = "text_classification") -> list[str]:
        base = dataclasses.replace(BASE, id="ft-x", source="fine_tuned", trained_for=task, labels=labels)
        request = parsed(CreateJob.model_validate({"model": "ft-x", "training_file": "file-1"}))
        return [part.name for part in planning.plan(request, base, file(), None, DEFAULTS).plan.parts]

    assert parts(("neg", "pos")) == ["head", "evaluation"]
    assert parts(("pos", "neg")) == ["centring", "head", "evaluation"]
    assert parts(("neg", "pos"), "another") == ["centring", "head", "evaluation"]
    assert parts(()) == ["centring", "head", "evaluation"]
