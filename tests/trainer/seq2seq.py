"""Tiny random encoder-decoder models with a word tokenizer, as plain transformers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("<pad>", "</s>", "<unk>", "le", "chat", "chien", "dort", "court", "the", "cat", "dog", "sleeps", "runs", "say")
FAMILIES = ("t5", "mt5", "bart", "marian")

_FRENCH = {"the": "le", "cat": "chat", "dog": "chien", "sleeps": "dort", "runs": "court"}


def make_seq2seq_base(folder: Path, family: str) -> Path:
    """Two layers of width 16 on each side. mT5's head is its own, the others' are tied to the embedding."""
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    special: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    model: hf.PreTrainedModel
    if family in ("t5", "mt5"):
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": len(WORDS)}
        if family == "t5":
            model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **special))
        else:
            config = hf.MT5Config(**sizes, **special, feed_forward_proj="gated-gelu")
            model = hf.MT5ForConditionalGeneration(config)
            # The configuration says tied whatever it is told; weights of its own are what unties a head.
            model.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn(len(WORDS), 16))
    else:
        sizes = {
            "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": len(WORDS),
            "max_position_embeddings": 32,
        }  # fmt: skip
        special |= {"bos_token_id": 0, "forced_eos_token_id": None}
        if family == "bart":
            model = hf.BartForConditionalGeneration(hf.BartConfig(**sizes, **special))
        else:
            marian = hf.MarianMTModel(hf.MarianConfig(**sizes, **special, scale_embedding=True))
            marian.final_logits_bias.uniform_(-0.5, 0.5)
            model = marian
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    ).save_pretrained(folder)
    return folder


def translations(count: int) -> list[tuple[str, str]]:
    """Word by word, in phrases of two lengths."""
    made = []
    for index in range(count):
        words = ["the", ("cat", "dog")[index % 2], ("sleeps", "runs")[index // 2 % 2]]
        words = words if index % 3 else words[:2]
        made.append((" ".join(words), " ".join(_FRENCH[word] for word in words)))
    return made
