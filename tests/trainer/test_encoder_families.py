"""XLM-RoBERTa and DistilBERT: every adaptation and every task of theirs, to a bundle that plain transformers loads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from app.catalog.recipes import HEAD_PHASE, MAIN_PHASE, Phase
from app.models.model_folder import inspect
from tests.trainer.jobs import ADAPTATIONS, BAD, FILLER, GOOD, KEY, make_job, rows
from worker.trainer.control import Control
from worker.trainer.families.encoder import RESIDUAL_SCALE
from worker.trainer.families.registry import family_for
from worker.trainer.run import run
from worker.trainer.spec import TaskSpec

FAMILIES = ("distilbert", "xlm-roberta")
TOKENS = TaskSpec("token_classification", {"tokens": "a", "tags": "c"}, ("O", "GOOD"), max_length=16)
MASKED = TaskSpec("masked_lm", {"text": "a"}, (), max_length=16)
CLASSES = TaskSpec("text_classification", {"text": "review", "label": "mood"}, ("negative", "positive"), max_length=16)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Family and folder: two layers of width 16, with the head that it was pretrained with."""
    family, folder = str(request.param), tmp_path_factory.mktemp("base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(7)
    model: PreTrainedModel
    if family == "distilbert":
        sizes: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
        model = DistilBertForMaskedLM(
            DistilBertConfig(vocab_size=len(words), max_position_embeddings=34, initializer_range=0.5, **sizes)
        )
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
        model = XLMRobertaForMaskedLM(
            XLMRobertaConfig(vocab_size=len(words), max_position_embeddings=34, initializer_range=0.5, **sizes, **ids)
        )
    model.save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    return family, folder


def test_the_catalog_reads_its_sizes(base: tuple[str, Path]) -> None:
    family, folder = base
    facts = inspect(folder, folder, "x").base
    assert (facts.family, facts.hidden_size, facts.num_layers) == (family, 16, 2)
    assert facts.max_length == (34 if family == "distilbert" else 32)
    assert "masked_lm" in facts.tasks


@pytest.mark.parametrize("adaptation", list(ADAPTATIONS))
def test_a_private_job_gives_a_bundle_that_plain_transformers_loads(
    tmp_path: Path, base: tuple[str, Path], adaptation: str
) -> None:
    family, folder = base
    job = make_job(tmp_path / "job", folder, family=family, adaptation=adaptation, steps=2)
    run(job.folder, KEY, Control(None))
    assert job.metrics()["released"] == "private"
    bundle = job.folder / "results/model"
    model = AutoModelForSequenceClassification.from_pretrained(bundle)
    assert type(model).__name__ == {
        "distilbert": "DistilBertForSequenceClassification",
        "xlm-roberta": "XLMRobertaForSequenceClassification",
    }.get(family)
    assert model.config.num_hidden_layers == 3
    again = family_for(family, CLASSES.type).load(bundle, CLASSES)
    assert again.config.num_hidden_layers == 3


@pytest.mark.parametrize("task", [TOKENS, MASKED], ids=["tokens", "masked"])
def test_its_other_tasks(tmp_path: Path, base: tuple[str, Path], task: TaskSpec) -> None:
    family, folder = base
    texts = [text for text, _ in rows(60)]
    main = Phase(MAIN_PHASE, ADAPTATIONS["lora"], 0.5, 2, 1e-2, 1e-2)
    head = Phase(HEAD_PHASE, ADAPTATIONS["head"], 0.5, 2, 1e-2, 1e-2)
    phases = (main,) if task is MASKED else (head, main)
    table = {"a": texts}
    if task is TOKENS:
        words = [text.split() for text in texts]
        tags = [["GOOD" if word in GOOD else "O" for word in each] for each in words]
        table = {"a": [json.dumps(each) for each in words], "c": [json.dumps(each) for each in tags]}
    job = make_job(tmp_path / "job", folder, family=family, task=task, phases=phases, data=[(t, "") for t in texts])
    pq.write_table(pa.table(table), job.folder / "data/training.parquet")
    run(job.folder, KEY, Control(None))
    cls = AutoModelForMaskedLM if task is MASKED else AutoModelForTokenClassification
    model = cls.from_pretrained(job.folder / "results/model")
    assert model.config.num_hidden_layers == 2


def test_without_noise_it_learns_the_task(tmp_path: Path, base: tuple[str, Path]) -> None:
    family, folder = base
    job = make_job(
        tmp_path / "job", folder, family=family, private=False, evaluation="public", steps=80, data=rows(200)
    )
    run(job.folder, KEY, Control(None))
    assert job.metrics()["accuracy"] >= 0.9  # half of the rows have either class


def test_a_classifiers_pooling_layer_does_not_stand_behind_tokens(tmp_path: Path, base: tuple[str, Path]) -> None:
    family, folder = base
    job = make_job(tmp_path / "job", folder, family=family, adaptation="head", steps=2)
    run(job.folder, KEY, Control(None))
    model = family_for(family, TOKENS.type).load(job.folder / "results/model", TOKENS)
    assert model.config.num_hidden_layers == 2
    plain = AutoModel.from_pretrained(folder)
    ids = torch.tensor([[2, 5, 8, 3]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(hidden, plain(input_ids=ids).last_hidden_state)


def test_distilberts_features_are_a_projection_that_a_relu_keeps(base: tuple[str, Path]) -> None:
    family, folder = base
    if family != "distilbert":
        pytest.skip("the others have a tanh there: tests/trainer/test_pooling.py")
    parts: Any = family_for(family, CLASSES.type)
    model = parts.load(folder, dataclasses.replace(CLASSES, labels=tuple("abcdefghijklmnop")))
    centre = 0.3 * torch.randn(16, generator=torch.Generator().manual_seed(2)) / 4
    ids, mask = torch.tensor([[2, 5, 8, 3], [2, 9, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(input_ids=ids, attention_mask=mask).last_hidden_state.double()
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        vectors = mean + hidden[:, 0] / RESIDUAL_SCALE
        for shift in (torch.zeros(16), centre.double()):
            vectors = vectors - shift
            vectors = vectors - vectors.mean(1, keepdim=True)
            vectors = vectors / vectors.norm(dim=1, keepdim=True)
        parts.set_centre(model, centre)
        features = parts.features(model, parts.pooled(model, {"input_ids": ids, "attention_mask": mask})).double()
        weight = model.get_parameter("pre_classifier.weight").double()[:8] * 4
        torch.testing.assert_close(features[:, :8] - features[:, 8:], vectors @ weight.T, rtol=0, atol=5e-5)
        assert float((features[:, :8] * features[:, 8:]).abs().max()) == 0.0
        model.classifier.weight.copy_(torch.eye(16))
        torch.testing.assert_close(
            model(input_ids=ids, attention_mask=mask).logits.double(), features, rtol=0, atol=5e-5
        )
