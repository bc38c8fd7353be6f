"""What patterns of `freeze` leave as it is, where a checkpoint names a weight more than once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from app.catalog.adaptations import Freeze
from worker.trainer.adaptations.freeze import FREEZE
from worker.trainer.families.registry import family_for
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
