"""Tiny random causal language models with a word tokenizer, as plain transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

WORDS = ("<pad>", "<eos>", "<unk>", "the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "tree", "and")


def make_causal_base(folder: Path, family: str) -> Path:
    """Two layers of width 16. Llama's head is its own, GPT-2's is tied to the embedding."""
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    model: PreTrainedModel
    if family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(WORDS), n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=32,
                bos_token_id=1,
                eos_token_id=1,
                pad_token_id=0,
            )
        )
    model.save_pretrained(folder)
    word_tokenizer(folder)
    return folder


def word_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A word is a token."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=32
    )
    fast.save_pretrained(folder)
    return fast


def sentences(count: int) -> list[str]:
    """A language of one grammar: after `cat` always `sat`, after `dog` always `ran`."""
    made = []
    for index in range(count):
        animal, verb = (("cat", "sat"), ("dog", "ran"))[index % 2]
        words = ["the", animal, verb, ("on", "under")[index % 3 == 0], "the", ("mat", "tree")[index % 5 == 0]]
        made.append(" ".join(words if index % 4 else [*words, "and", "a", animal, verb]))
    return made
