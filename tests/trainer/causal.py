"""Tiny random causal language models with a word tokenizer, as plain transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WORDS = ("<pad>", "<eos>", "<unk>", "the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "tree", "and")
#: Of chats: the plain template's, those of ChatML, and a little talk.
CHAT_WORDS = (
    *WORDS, ":", "System", "User", "Assistant", "Tool", "Tools", "<|im_start|>", "<|im_end|>", "system", "user",
    "assistant", "tool", "what", "does", "do", "it", "is", "be", "brief",
)  # fmt: skip


def make_causal_base(
    folder: Path, family: str, words: tuple[str, ...] = WORDS, template: str | None = None, positions: int = 32
) -> Path:
    """Two layers of width 16. GPT-2's head and Qwen3's are tied to the embedding, the others have their own."""
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    model: PreTrainedModel
    if family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(words),
                n_positions=positions,
                n_embd=16,
                n_layer=2,
                n_head=2,
                bos_token_id=1,
                eos_token_id=1,
            )
        )
    else:
        sizes: dict[str, Any] = {
            "vocab_size": len(words),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": positions,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
        if family == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**sizes))
        elif family == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8, tie_word_embeddings=True))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(folder)
    word_tokenizer(folder, words, template, positions)
    return folder


def word_tokenizer(
    folder: Path, words: tuple[str, ...] = WORDS, template: str | None = None, length: int = 32
) -> PreTrainedTokenizerFast:
    """A word is a token."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=[word for word in words if word.startswith("<|")],
        model_max_length=length,
    )
    if template is not None:
        fast.chat_template = template
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
