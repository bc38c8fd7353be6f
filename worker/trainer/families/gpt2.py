"""GPT-2 (Radford et al. 2019): learned positions, Conv1D matrices, the head tied to the embedding."""

from __future__ import annotations

from transformers import AutoModelForCausalLM

from worker.trainer.families.transformer import TransformerFamily

GPT2_CAUSAL = TransformerFamily(
    model_type="gpt2",
    auto_class=AutoModelForCausalLM,
    stacks=("transformer.h",),
    lora_targets=("c_attn",),  # query, key and value in one matrix
)
