"""A model that this service trained as the base of another job: nothing is grafted twice, a head goes on or is new."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from app.catalog.adaptations import Full
from app.catalog.recipes import MAIN_PHASE, Phase
from app.models.model_folder import inspect
from tests.trainer.encoders import make_encoder_base
from tests.trainer.jobs import CLASSIFICATION, KEY, LABELS, make_job, rows
from worker.trainer.control import Control
from worker.trainer.families.registry import family_for
from worker.trainer.run import run
from worker.trainer.spec import TaskSpec

MASKED_TEXTS = TaskSpec("masked_lm", {"text": "review"}, (), max_length=16)


def trained_once(folder: Path, base: Path, family: str) -> Path:
    job = make_job(folder, base, family=family, adaptation="lora")
    run(job.folder, KEY, Control(None))
    return job.folder / "results/model"


@pytest.fixture(scope="module", params=["bert", "roberta"])
def first(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Family, its untrained base, and the bundle of a job on it."""
    from tests.trainer.jobs import make_base

    family, folder = str(request.param), tmp_path_factory.mktemp("again")
    base = make_base(folder / "base", family)
    return family, base, trained_once(folder / "job", base, family)


def test_the_same_classes_go_on_with_the_same_head(first: tuple[str, Path, Path]) -> None:
    family, _, bundle = first
    loaded = family_for(family, "text_classification").load(bundle, CLASSIFICATION)
    before = load_file(bundle / "model.safetensors")
    after = loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_classes_get_a_new_head_on_the_same_vectors(first: tuple[str, Path, Path]) -> None:
    family, _, bundle = first
    architecture = family_for(family, "text_classification")
    before = load_file(bundle / "model.safetensors")
    for labels in (("a", "b", "c"), ("positive", "negative")):
        loaded = architecture.load(bundle, dataclasses.replace(CLASSIFICATION, labels=labels))
        head = set(architecture.head_parameters(loaded))
        after = loaded.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before if name not in head)
        assert [float(after[name].abs().max()) for name in head] == [0.0, 0.0]
        assert len(loaded.config.id2label) == len(labels)


def test_a_second_job_trains_and_exports(tmp_path: Path, first: tuple[str, Path, Path]) -> None:
    family, base, bundle = first
    task = TaskSpec("text_classification", CLASSIFICATION.columns, ("bad", *LABELS), max_length=16)
    data = [*rows(59), ("awful", "bad")]
    job = make_job(tmp_path / "job", bundle, family=family, adaptation="lora", task=task, data=data)
    run(job.folder, KEY, Control(None))
    model = AutoModelForSequenceClassification.from_pretrained(job.folder / "results/model")
    assert model.config.num_hidden_layers == 3  # the base's two, and one that pools
    assert model.config.num_labels == 3
    found = inspect(job.folder / "results/model", job.folder, "ft-x", "fine_tuned").base
    assert (found.trained_for, found.labels, found.num_layers) == ("text_classification", ("bad", *LABELS), 2)
    assert found.pools
    assert not inspect(base, base, "x").base.pools
    assert found.continues("text_classification", ("bad", *LABELS))
    assert not found.continues("text_classification", LABELS)
    assert not inspect(base, base, "x").base.continues("text_classification", ())


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_masked_language_model_learns_classes_next(tmp_path: Path, family: str) -> None:
    """Adapted to texts without labels first: then it pools and classifies like any other base, and tags tokens."""
    base = make_encoder_base(tmp_path / "base", "masked", family)
    main = Phase(MAIN_PHASE, Full(), 0.5, 3, 1e-2, 1e-2)
    first = make_job(tmp_path / "first", base, family=family, task=MASKED_TEXTS, phases=(main,))
    run(first.folder, KEY, Control(None))
    adapted = first.folder / "results/model"
    found = inspect(adapted, adapted, "ft-x", "fine_tuned").base
    assert {"text_classification", "token_classification", "masked_lm"} <= {*found.tasks}
    second = make_job(tmp_path / "second", adapted, family=family, private=False, evaluation="public", steps=30)
    run(second.folder, KEY, Control(None))
    name = f"{family}.embeddings.word_embeddings.weight"
    bundle = second.folder / "results/model"
    before, between, after = (load_file(folder / "model.safetensors") for folder in (base, adapted, bundle))
    assert not torch.equal(before[name], between[name])
    assert torch.equal(between[name], after[name])
    assert AutoModelForSequenceClassification.from_pretrained(bundle).config.id2label == dict(enumerate(LABELS))
    assert second.metrics()["accuracy"] > 0.7
