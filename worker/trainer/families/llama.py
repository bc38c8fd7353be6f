"""Llama (Touvron et al. 2023), and what is built like it: rotary positions, RMSNorm, gated feed-forward layers."""

from __future__ import annotations

from transformers import AutoModelForCausalLM

from worker.trainer.families.transformer import TransformerFamily

LLAMA_CAUSAL = TransformerFamily(model_type="llama", auto_class=AutoModelForCausalLM, stacks=("model.layers",))
