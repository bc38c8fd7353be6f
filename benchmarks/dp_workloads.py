"""What `dp_step` measures: shapes of models that people fine-tune, random weights, losses for each record."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

Batch = dict[str, Tensor]
SNIPPETS = Path(__file__).parents[1] / "demo" / "movie_snippets.csv"


@dataclass(frozen=True)
class Workload:
    """rows: physical batch. lengths: tokens of each row, for the workloads whose batches are cut by length."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    batch: Callable[[int], Batch]
    rows: int
    lengths: Callable[[int], list[int]] | None = None


def _classification(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def _causal(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(**batch).logits[:, :-1]
    targets = batch["input_ids"][:, 1:]
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    return losses.view(targets.shape).mean(1)


def _bert(hidden: int, layers: int, heads: int) -> nn.Module:
    config = hf.BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return hf.BertForSequenceClassification(config)


def _minilm() -> nn.Module:
    return _bert(384, 6, 12)


def _last_two_layers() -> nn.Module:
    model = _minilm().requires_grad_(False)
    for part in (*model.bert.encoder.layer[-2:], model.bert.pooler, model.classifier):
        part.requires_grad_(True)
    return model


def _head() -> nn.Module:
    model = _minilm().requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def _roberta(hidden: int, layers: int, heads: int) -> nn.Module:
    config = hf.RobertaConfig(
        vocab_size=50265,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return hf.RobertaForSequenceClassification(config)


def _roberta_lora() -> nn.Module:
    return get_peft_model(_roberta(1024, 24, 16), LoraConfig(r=8, target_modules=["query", "value"]))


def _causal_1b_lora() -> nn.Module:
    """Llama's shape with 1.2 billion weights, frozen in bf16; the adapters are float32."""
    config = hf.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
    )
    base = hf.LlamaForCausalLM(config).to(torch.bfloat16)
    return get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))


def _lora() -> nn.Module:
    return get_peft_model(_minilm(), LoraConfig(r=8, target_modules=["query", "value"]))


def _gpt2() -> nn.Module:
    config = hf.GPT2Config(n_embd=768, n_layer=4, n_head=12, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return hf.GPT2LMHeadModel(config)


def _vit_small() -> nn.Module:
    config = hf.ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
    return hf.ViTForImageClassification(config)


def text(length: int) -> Callable[[int], Batch]:
    def batch(rows: int) -> Batch:
        return {
            "input_ids": torch.randint(5, 30000, (rows, length)),
            "attention_mask": torch.ones(rows, length, dtype=torch.long),
            # Given and contiguous, as Opacus needs them.
            "position_ids": torch.arange(length).repeat(rows, 1),
            "token_type_ids": torch.zeros(rows, length, dtype=torch.long),
            "labels": torch.randint(0, 2, (rows,)),
        }

    return batch


def _tokens(length: int) -> Callable[[int], Batch]:
    def batch(rows: int) -> Batch:
        return {
            "input_ids": torch.randint(5, 30000, (rows, length)),
            "position_ids": torch.arange(length).repeat(rows, 1),
        }

    return batch


def _images(rows: int) -> Batch:
    return {"pixel_values": torch.randn(rows, 3, 224, 224), "labels": torch.randint(0, 2, (rows,))}


def snippet_lengths(rows: int) -> list[int]:
    """Tokens (words plus two, at most 128) of `rows` of the demo's movie snippets, evenly taken."""
    with SNIPPETS.open(newline="", encoding="utf-8") as file:
        lengths = [min(128, len(row["text"].split()) + 2) for row in csv.DictReader(file)]
    return [lengths[i * len(lengths) // rows] for i in range(rows)]


WORKLOADS: dict[str, Workload] = {
    "minilm full T=128 B=64": Workload(_minilm, _classification, text(128), 64),
    "minilm full T=512 B=4": Workload(_minilm, _classification, text(512), 4),
    "minilm full T=32 B=64": Workload(_minilm, _classification, text(32), 64),
    "bert d=768 4 layers T=128 B=8": Workload(lambda: _bert(768, 4, 12), _classification, text(128), 8),
    "gpt2 d=768 4 layers T=256 B=4": Workload(_gpt2, _causal, _tokens(256), 4),
    "vit-small T=197 B=8": Workload(_vit_small, _classification, _images, 8),
    "minilm lora r=8 T=128 B=16": Workload(_lora, _classification, text(128), 16),
    "minilm last two layers T=128 B=16": Workload(_last_two_layers, _classification, text(128), 16),
    "minilm head T=128 B=16": Workload(_head, _classification, text(128), 16),
    "minilm full, real lengths B=128": Workload(_minilm, _classification, text(128), 128, snippet_lengths),
}

#: What `--device cuda` measures, under bf16 autocast.
CUDA_WORKLOADS: dict[str, Workload] = {
    "roberta-base full T=128 B=64": Workload(lambda: _roberta(768, 12, 12), _classification, text(128), 64),
    "roberta-base full T=128 B=256": Workload(lambda: _roberta(768, 12, 12), _classification, text(128), 256),
    "roberta-large full T=128 B=32": Workload(lambda: _roberta(1024, 24, 16), _classification, text(128), 32),
    "roberta-large full T=128 B=128": Workload(lambda: _roberta(1024, 24, 16), _classification, text(128), 128),
    "roberta-large lora r=8 T=128 B=128": Workload(_roberta_lora, _classification, text(128), 128),
    "causal 1B lora r=8 T=512 B=8": Workload(_causal_1b_lora, _causal, _tokens(512), 8),
}
