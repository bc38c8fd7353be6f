"""Every family from a folder as hubs have it: read as plain transformers reads it, trained privately, loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from app.catalog.adaptations import Freeze
from app.catalog.families import FAMILIES
from app.catalog.recipes import MAIN_PHASE, Phase
from app.models.model_folder import inspect
from tests.trainer.hub_families import MAKERS, make_hub_base
from tests.trainer.images import make_image_job
from tests.trainer.jobs import ADAPTATIONS, KEY, MadeJob, make_job, rows
from tests.trainer.seq2seq import FAMILIES as SEQ2SEQ
from tests.trainer.seq2seq import make_seq2seq_base, translations
from tests.trainer.test_hub_folders import laid_out
from worker.trainer.adaptations.registry import ADAPTERS
from worker.trainer.control import Control
from worker.trainer.families.registry import family_for
from worker.trainer.run import run
from worker.trainer.spec import TaskSpec

CHAT = TaskSpec("chat", {"messages": "review"}, (), 48)
PLAIN = TaskSpec("language_modeling", {"text": "review"}, (), 32)
SUMMARY = TaskSpec("summarization", {"source": "review", "target": "mood"}, (), 16, {"max_target_length": 12})


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of each family the folder, and what the worker makes of it for a trainer."""
    root = tmp_path_factory.mktemp("hub")
    folders = {family: make_hub_base(root / family, family) for family in MAKERS}
    return {family: (folder, laid_out(folder, root / f"{family}-base")) for family, folder in folders.items()}


def job_of(folder: Path, family: str, base: Path) -> MadeJob:
    full: Any = (Phase(MAIN_PHASE, ADAPTATIONS["full"], 0.5, 3, 1e-2, 1e-2),)
    kind = FAMILIES[family].kind
    if kind == "image":
        return make_image_job(folder, (family, base))
    if kind == "encoder":
        return make_job(folder, base, family=family, adaptation="lora")
    if kind == "seq2seq":
        return make_job(folder, base, family=family, task=SUMMARY, phases=full, data=translations(60))
    texts = [(text, label) for text, label in rows()]
    if family == "gpt2":
        return make_job(folder, base, family=family, task=PLAIN, phases=full, data=texts)
    turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in texts]
    chats = [(json.dumps(chat), "") for chat in turns]
    return make_job(folder, base, family=family, task=CHAT, phases=full, data=chats)


@pytest.mark.parametrize("family", MAKERS)
def test_a_private_job_on_it_gives_a_bundle_that_is_a_base_again(
    tmp_path: Path, hub: dict[str, tuple[Path, Path]], family: str
) -> None:
    job = job_of(tmp_path / "job", family, hub[family][1])
    run(job.folder, KEY, Control(None))
    assert job.metrics()["released"] == "private"
    bundle = job.folder / "results/model"
    names = {path.name for path in bundle.iterdir()}
    reader = "preprocessor_config.json" if FAMILIES[family].kind == "image" else "tokenizer.json"
    assert {"config.json", "model.safetensors", reader} <= names
    assert json.loads((bundle / "config.json").read_text())["dtype"] == "float32"
    again = inspect(bundle, bundle.parent, "again", "fine_tuned").base
    assert (again.family, bool(again.tasks)) == (family, True)


VIT = "ViTImageProcessor"
TEXT = ["The film was GOOD, awful!", "a plot"]


@pytest.mark.parametrize("family", [family for family in MAKERS if FAMILIES[family].kind != "image"])
def test_texts_are_read_as_plain_transformers_reads_them(hub: dict[str, tuple[Path, Path]], family: str) -> None:
    theirs, ours = (AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] for folder in hub[family])
    assert theirs == ours
    assert len(ours[0]) > len(ours[1])


@pytest.mark.parametrize("family", [family for family in MAKERS if FAMILIES[family].kind == "image"])
def test_images_are_read_as_plain_transformers_reads_them(
    tmp_path: Path, hub: dict[str, tuple[Path, Path]], family: str
) -> None:
    folder, base = hub[family]
    said = json.loads((folder / "preprocessor_config.json").read_text())
    if family == "vit":  # which names a class that is gone
        folder = tmp_path
        (folder / "preprocessor_config.json").write_text(json.dumps({**said, "image_processor_type": VIT}))
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    load: Any = AutoImageProcessor.from_pretrained
    theirs, ours = (load(place)(image, return_tensors="pt")["pixel_values"] for place in (folder, base))
    assert torch.equal(theirs, ours)
    assert ours.shape[-2:] == (32, 32)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_weights_in_shards_bfloat16_and_names_of_old_are_the_models_own(
    hub: dict[str, tuple[Path, Path]], family: str
) -> None:
    folder, base = hub[family]
    model = family_for(family, "language_modeling").load(base, PLAIN)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_distilled_deit_keeps_its_body_and_gets_one_head(hub: dict[str, tuple[Path, Path]]) -> None:
    folder, base = hub["deit"]
    task = TaskSpec("image_classification", {}, ("dark", "bright"), 1)
    model = family_for("deit", "image_classification").load(base, task)
    theirs = AutoModelForImageClassification.from_pretrained(folder)
    assert type(theirs).__name__ == "DeiTForImageClassificationWithTeacher"
    ours = {name: value for name, value in model.state_dict().items() if name.startswith("deit.")}
    assert ours
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.items())
    assert model.classifier.out_features == 2


def test_norms_under_their_first_names_are_read_counted_and_frozen(hub: dict[str, tuple[Path, Path]]) -> None:
    folder, base = hub["bert"]
    weights = load_file(folder / "model.safetensors")
    biases = {name for name in weights if name.endswith(("bias", "LayerNorm.beta"))}
    assert any(name.endswith("beta") for name in biases)
    found = inspect(folder, folder.parent, "mine").base
    assert found.bias_parameters == sum(weights[name].numel() for name in biases)
    family = family_for("bert", "token_classification")
    model = family.load(base, TaskSpec("token_classification", {}, ("O", "GOOD"), 16))
    assert torch.equal(model.bert.embeddings.LayerNorm.bias, weights["bert.embeddings.LayerNorm.beta"])
    trained = ADAPTERS["freeze"].parameters(model, family, Freeze(("*.gamma",)))
    assert "bert.embeddings.LayerNorm.bias" in trained
    assert not any(name.endswith("LayerNorm.weight") for name in trained)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "gpt2", "llama", "bart", "t5", "mt5", "marian"])
def test_a_weight_that_a_file_has_under_several_names_is_counted_once(tmp_path: Path, family: str) -> None:
    """As in files that were converted from pickles; the model that plain transformers loads says how many there are."""
    folder = tmp_path / "mine"
    make: Any = make_seq2seq_base if family in SEQ2SEQ else make_hub_base
    make(folder, family)
    kind = FAMILIES[family].kind
    auto: Any = {"encoder": AutoModelForMaskedLM, "causal": AutoModelForCausalLM}.get(kind, AutoModelForSeq2SeqLM)
    model = auto.from_pretrained(folder, dtype=torch.float32)
    before = inspect(folder, tmp_path, "mine").base
    for path in folder.glob("model*"):
        path.unlink()
    everything = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(everything, folder / "model.safetensors", {"format": "pt"})
    after = inspect(folder, tmp_path, "mine").base
    assert len(after.parameter_names) > len([*model.parameters()])
    buffers = sum(value.numel() for name, value in model.named_buffers() if name in everything)
    computed = FAMILIES[family].fixed  # positions, say
    learnt = sum(value.numel() for name, value in model.named_parameters() if not name.endswith(computed))
    assert after.parameters == learnt + buffers
    if family != "bert":  # whose file has what a model for the masked alone leaves out
        assert (before.parameters, before.bias_parameters) == (after.parameters, after.bias_parameters)
