"""BART and Marian (Lewis et al. 2020; Junczys-Dowmunt et al. 2018): one embedding for both stacks and the head.

Marian's positions are sinusoids that transformers keeps as frozen parameters and computes again at loading.
"""

from __future__ import annotations

from transformers import AutoModelForSeq2SeqLM

from worker.trainer.families.transformer import TransformerFamily

BART = TransformerFamily(
    model_type="bart",
    auto_class=AutoModelForSeq2SeqLM,
    stacks=("model.encoder.layers", "model.decoder.layers"),
    unmovable=("k_proj.bias",),  # softmax ignores a shift of all keys
)
MARIAN = TransformerFamily(
    model_type="marian",
    auto_class=AutoModelForSeq2SeqLM,
    stacks=("model.encoder.layers", "model.decoder.layers"),
    unmovable=("k_proj.bias",),
    fixed=("embed_positions.weight",),
)
