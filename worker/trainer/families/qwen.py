"""Qwen 2 and 3 (Yang et al. 2024, 2025): built like Llama; 2 has biases on query, key and value, 3 norms on the first
two."""

from __future__ import annotations

from transformers import AutoModelForCausalLM

from worker.trainer.families.transformer import TransformerFamily

QWEN2_CAUSAL = TransformerFamily(model_type="qwen2", auto_class=AutoModelForCausalLM, stacks=("model.layers",))
QWEN3_CAUSAL = TransformerFamily(model_type="qwen3", auto_class=AutoModelForCausalLM, stacks=("model.layers",))
