"""What patterns of `freeze` leave as it is, by a checkpoint's names; and what of these the service knows before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForPreTraining,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from app.catalog.adaptations import Freeze
from app.catalog.parameters import trained_names
from app.catalog.tasks import TASKS, ModelClass
from app.models.model_folder import inspect
from tests.trainer import causal, hub_folders, images, jobs, seq2seq
from worker.trainer.adaptations.freeze import FREEZE
from worker.trainer.families.loading import names_in_files
from worker.trainer.families.registry import FAMILIES, family_for
from worker.trainer.spec import TaskSpec

SIZES = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 1}


@pytest.mark.parametrize(
    ("family", "stored", "again"),
    [
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("t5", "shared.weight", "encoder.embed_tokens.weight"),
        ("t5", "shared.weight", "lm_head.weight"),
    ],
)
def test_a_tied_weight_rests_by_each_of_its_names(tmp_path: Path, family: str, stored: str, again: str) -> None:
    torch.manual_seed(0)
    if family == "gpt2":
        task = TaskSpec("language_modeling", {"text": "a"}, (), max_length=16)
        GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=16, n_layer=1, n_head=2, n_positions=32)).save_pretrained(tmp_path)
    else:
        task = TaskSpec("text_to_text", {"source": "a", "target": "b"}, (), max_length=16)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        T5ForConditionalGeneration(T5Config(**SIZES, **sizes, decoder_start_token_id=0)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert again not in weights
    save_file({**weights, again: weights[stored].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    parts = family_for(family, task.type)
    model = parts.load(tmp_path, task)
    for pattern in (stored, again):
        trained = FREEZE.parameters(model, parts, Freeze((pattern,)))
        assert {*parts.body_parameters(model)} - {*trained} == {stored}


ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert")
SPECS: dict[ModelClass, TaskSpec] = {
    "sequence_classification": TaskSpec("text_classification", {"text": "a", "label": "b"}, ("x", "y"), max_length=16),
    "token_classification": TaskSpec("token_classification", {"tokens": "a", "tags": "b"}, ("x", "y"), max_length=16),
    "masked_lm": TaskSpec("masked_lm", {"text": "a"}, (), max_length=16),
    "causal_lm": TaskSpec("language_modeling", {"text": "a"}, (), max_length=16),
    "seq2seq_lm": TaskSpec("text_to_text", {"source": "a", "target": "b"}, (), max_length=16),
    "image_classification": TaskSpec("image_classification", {"image": "a", "label": "b"}, ("x", "y"), max_length=1),
}
PAIRS = [(family, model_class) for family, classes in FAMILIES.items() for model_class in classes]

#: What files of a family may hold besides, and no model of a task here reads.
FOREIGN = {
    "bert": ("cls.seq_relationship.weight", "qa_outputs.bias"),
    "roberta": ("roberta.pooler.dense.weight", "roberta.pooler.dense.bias"),
    "distilbert": ("qa_outputs.weight",),
    "vit": ("vit.pooler.dense.weight", "pooler.dense.bias"),
    "deit": ("distillation_classifier.weight",),
    "gpt2": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"),
    "llama": ("model.layers.0.self_attn.rotary_emb.inv_freq",),
    "t5": ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
}


def save_base(folder: Path, family: str, spelling: str) -> None:
    """As it is when it was pretrained: with every head, and with blocks that its configuration does not count.

    spelling: `whole`; `bare`, of the body alone; `old`, as the first checkpoints of BERT have it.
    """
    if family in ("mbart", "m2m_100"):
        (hub_folders.make_mbart if family == "mbart" else hub_folders.make_m2m)(folder)
    elif family in seq2seq.FAMILIES:
        seq2seq.make_seq2seq_base(folder, family)
    elif family in ("gpt2", "llama", "qwen2", "qwen3"):
        causal.make_causal_base(folder, family)
    elif family in ENCODERS:
        jobs.make_base(folder)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        made: PreTrainedModel
        if family == "bert":
            made = BertForPreTraining(BertConfig(vocab_size=17, **sizes))
        elif family == "roberta":
            made = RobertaForMaskedLM(RobertaConfig(vocab_size=17, pad_token_id=0, **sizes))
        elif family == "xlm-roberta":
            made = XLMRobertaForMaskedLM(XLMRobertaConfig(vocab_size=17, pad_token_id=0, **sizes))
        else:
            made = DistilBertForMaskedLM(DistilBertConfig(vocab_size=17, dim=16, n_layers=2, n_heads=2, hidden_dim=32))
        made.save_pretrained(folder)
    else:
        folder.mkdir()
        images.make_image_base(folder, family)
    path = folder / "model.safetensors"
    weights = {**load_file(path), **{name: torch.zeros(3) for name in FOREIGN.get(family, ())}}
    if family in (*ENCODERS, "gpt2", "llama", "qwen2", "qwen3"):
        weights |= {name.replace(".1.", ".2."): value.clone() for name, value in weights.items() if ".1." in name}
    if spelling == "bare":
        weights = {name.removeprefix(f"{BODIES[family]}."): value for name, value in weights.items()}
    elif spelling == "old":
        old = ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")
        for now, then in old:
            weights = {name.replace(now, then): value for name, value in weights.items()}
    save_file(weights, path, metadata={"format": "pt"})


#: What the body is called in names of the whole.
BODIES = {**{name: name for name in ("bert", "roberta", "distilbert", "vit", "convnext", "bit")}, "gpt2": "transformer"}
CASES = [
    *((*pair, "whole") for pair in PAIRS),
    *((*pair, "bare") for pair in PAIRS if pair[0] in BODIES),
    ("bert", "sequence_classification", "old"),
    ("bert", "masked_lm", "old"),
]


@pytest.mark.parametrize(("family", "model_class", "spelling"), CASES)
def test_what_a_task_trains_is_known_before_it_is_loaded(
    tmp_path: Path, family: str, model_class: ModelClass, spelling: str
) -> None:
    """The service, by the names of a header alone, against what the trainer makes of the same files."""
    save_base(tmp_path / "base", family, spelling)
    spec = SPECS[model_class]
    base = inspect(tmp_path / "base", tmp_path, "base").base
    parts = family_for(family, spec.type)
    model = parts.load(tmp_path / "base", spec)
    in_files = names_in_files(model)
    trained = {name for parameter in parts.body_parameters(model) for name in in_files[parameter]}
    if spelling == "bare":  # by a pattern's beginning at a dot these are the same
        trained = {name.removeprefix(f"{BODIES[family]}.") for name in trained}
    assert {*trained_names(base, TASKS[spec.type])} == trained & {*base.parameter_names}
    assert trained & {*base.parameter_names}
