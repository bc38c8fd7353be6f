"""Tiny models of every family with a per-record loss and a synthetic batch: what the exactness tests run over."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from worker.trainer.families.group_norm import with_group_norm
from worker.trainer.families.modeling_group_norm import GroupNorm

Batch = dict[str, Tensor]
VOCABULARY, LENGTH, CLASSES = 60, 7, 3


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def _token_mean(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    mask = mask.to(losses.dtype)
    return (losses * mask).sum(1) / mask.sum(1).clamp(min=1)


def causal_loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return _token_mean(logits[:, :-1], batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:])


def seq2seq_loss(model: nn.Module, batch: Batch) -> Tensor:
    target = batch["decoder_input_ids"]
    logits = model(**batch).logits
    return _token_mean(logits[:, :-1], target[:, 1:], target[:, 1:] != 1)


def text_batch(rows: int, length: int = LENGTH, seed: int = 0) -> Batch:
    """Right-padded to different lengths; repeated ids, so that embeddings have equal ids to sum over."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 12, (rows, length), generator=generator)
    lengths = torch.randint(2, length + 1, (rows,), generator=generator)
    mask = (torch.arange(length)[None, :] < lengths[:, None]).long()
    return {
        "input_ids": ids * mask + (1 - mask),
        "attention_mask": mask,
        "labels": torch.randint(0, CLASSES, (rows,), generator=generator),
    }


def _lm_batch(rows: int, seed: int = 0) -> Batch:
    batch = text_batch(rows, seed=seed)
    del batch["labels"]
    return batch


def _seq2seq_batch(rows: int, seed: int = 0) -> Batch:
    batch = _lm_batch(rows, seed)
    batch["decoder_input_ids"] = text_batch(rows, length=5, seed=seed + 1)["input_ids"]
    return batch


def _image_batch(rows: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator),
        "labels": torch.randint(0, CLASSES, (rows,), generator=generator),
    }


_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "num_labels": CLASSES,
}


def _bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**_TEXT))


def _distilbert() -> nn.Module:
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=20,
        pad_token_id=1, num_labels=CLASSES,
    )  # fmt: skip
    return hf.DistilBertForSequenceClassification(config)


def _roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**_TEXT))


def _xlm_roberta() -> nn.Module:
    return hf.XLMRobertaForSequenceClassification(hf.XLMRobertaConfig(**_TEXT))


def _mpnet() -> nn.Module:
    return hf.MPNetForSequenceClassification(hf.MPNetConfig(**_TEXT))


def _albert() -> nn.Module:
    """One layer, used twice."""
    return hf.AlbertForSequenceClassification(hf.AlbertConfig(**_TEXT, embedding_size=8))


def _gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=20, bos_token_id=0, eos_token_id=2
    )
    return hf.GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT, num_key_value_heads=1))


def _smollm() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT, num_key_value_heads=1, tie_word_embeddings=True))


def _qwen2() -> nn.Module:
    """With biases on queries, keys and values."""
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**_TEXT, num_key_value_heads=1))


def _qwen_tied() -> nn.Module:
    config = hf.Qwen3Config(**_TEXT, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)
    return hf.Qwen3ForCausalLM(config)


def _gemma_tied() -> nn.Module:
    return hf.GemmaForCausalLM(hf.GemmaConfig(**_TEXT, num_key_value_heads=1, head_dim=8))


def _t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=1,
        eos_token_id=2, decoder_start_token_id=0, relative_attention_num_buckets=8,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def _mt5() -> nn.Module:
    """Untied, with gated feed-forward layers."""
    config = hf.MT5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, pad_token_id=1,
        eos_token_id=2, decoder_start_token_id=0, relative_attention_num_buckets=8,
    )  # fmt: skip
    return hf.MT5ForConditionalGeneration(config)


def _marian(**sides: Any) -> nn.Module:
    """Embeddings scaled and tied three times, sinusoidal positions, a bias on the logits that is no parameter."""
    config = hf.MarianConfig(
        **sides,
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=20,
        pad_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None, scale_embedding=True,
    )  # fmt: skip
    return hf.MarianMTModel(config)


def _marian_separate() -> nn.Module:
    """Embeddings of each side's own; the head is the decoder's."""
    return _marian(share_encoder_decoder_embeddings=False, decoder_vocab_size=VOCABULARY - 9)


def _m2m_100() -> nn.Module:
    """Embeddings scaled and tied three times; positions are no parameters, and counted where there is no padding."""
    config = hf.M2M100Config(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=20,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, scale_embedding=True,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0,
    )  # fmt: skip
    return hf.M2M100ForConditionalGeneration(config)


def _mbart() -> nn.Module:
    config = hf.MBartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=20,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        scale_embedding=True,
    )  # fmt: skip
    return hf.MBartForConditionalGeneration(config)


def _bart() -> nn.Module:
    config = hf.BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=20,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=0, forced_eos_token_id=None,
        scale_embedding=True,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)


def _vit() -> nn.Module:
    config = hf.ViTConfig(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_labels=CLASSES,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


def _deit() -> nn.Module:
    """A class token and one for distillation, each with a head."""
    config = hf.DeiTConfig(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, num_labels=CLASSES,
    )  # fmt: skip
    return hf.DeiTForImageClassificationWithTeacher(config)


def _resnet() -> nn.Module:
    """BatchNorm with frozen statistics: its scales and shifts are trained."""
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=CLASSES)
    return hf.ResNetForImageClassification(config)


def _efficientnet() -> nn.Module:
    """Depthwise convolutions, squeeze and excitation, BatchNorm with frozen statistics."""
    config = hf.EfficientNetConfig(
        image_size=16, width_coefficient=0.25, depth_coefficient=1.0, num_block_repeats=[1, 1], kernel_sizes=[3, 5],
        in_channels=[32, 16], out_channels=[16, 24], strides=[1, 2], expand_ratios=[1, 2], hidden_dim=320,
        num_labels=CLASSES,
    )  # fmt: skip
    return hf.EfficientNetForImageClassification(config)


def _with_group_norm(base: nn.Module) -> nn.Module:
    """GroupNorm in place of BatchNorm, behind statistics as a pretrained base has them."""
    model = with_group_norm(base, lambda made: [name for name, _ in made.named_parameters()])
    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 3.0)
    return model.requires_grad_(True)


def _resnet_group_norm() -> nn.Module:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[32, 48], depths=[1, 1], num_labels=CLASSES)
    return _with_group_norm(hf.ResNetForImageClassification(config))


def _efficientnet_group_norm() -> nn.Module:
    """Depthwise convolutions in front of groups of several channels."""
    config = hf.EfficientNetConfig(
        image_size=16, width_coefficient=0.25, depth_coefficient=1.0, num_block_repeats=[1, 2], kernel_sizes=[3, 5],
        in_channels=[32, 16], out_channels=[16, 24], strides=[1, 2], expand_ratios=[1, 4], hidden_dim=320,
        num_labels=CLASSES,
    )  # fmt: skip
    return _with_group_norm(hf.EfficientNetForImageClassification(config))


def _convnext() -> nn.Module:
    config = hf.ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 12], depths=[1, 1], patch_size=2, num_labels=CLASSES,
        layer_scale_init_value=0.5,
    )  # fmt: skip
    return hf.ConvNextForImageClassification(config)


class _GroupNormNet(nn.Module):
    """A residual network with GroupNorm, a grouped convolution and a 1-d one; returns logits like transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.block = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.same = nn.Conv2d(8, 8, (3, 4), padding="same", dilation=(1, 2), groups=2)
        self.mix = nn.Conv1d(8, 6, 3, padding=1)
        self.scale = nn.RMSNorm(6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, pixel_values: Tensor) -> hf.modeling_outputs.SequenceClassifierOutput:
        x = F.relu(self.norm(self.stem(pixel_values)))
        x = x + F.relu(self.block(x))
        x = x + torch.tanh(self.same(x))
        x = self.scale(self.mix(x.flatten(2)).transpose(1, 2)).mean(1)
        return hf.modeling_outputs.SequenceClassifierOutput(logits=self.head(x))


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    batch: Callable[..., Batch]
    lora_targets: str | None = None  # peft's target_modules; None: no LoRA test
    tolerance: float = 1e-12  # in float64; larger where the model normalizes in float32 whatever its weights are


CASES: dict[str, Case] = {
    "bert": Case(_bert, classification_loss, text_batch, r".*attention.self.(query|value)"),
    "distilbert": Case(_distilbert, classification_loss, text_batch, r".*(q_lin|v_lin)"),
    "roberta": Case(_roberta, classification_loss, text_batch, r".*(query|value)"),
    "xlm_roberta": Case(_xlm_roberta, classification_loss, text_batch, r".*(query|value)"),
    "mpnet": Case(_mpnet, classification_loss, text_batch),
    "albert": Case(_albert, classification_loss, text_batch),
    "gpt2": Case(_gpt2, causal_loss, _lm_batch, r".*c_attn"),
    "llama": Case(_llama, causal_loss, _lm_batch, r".*(q_proj|v_proj)", 1e-6),
    "smollm": Case(_smollm, causal_loss, _lm_batch, r".*(q_proj|v_proj)", 1e-6),
    "qwen2": Case(_qwen2, causal_loss, _lm_batch, r".*(q_proj|v_proj)", 1e-6),
    "qwen3_tied": Case(_qwen_tied, causal_loss, _lm_batch, r".*(q_proj|down_proj)", 1e-6),
    "gemma_tied": Case(_gemma_tied, causal_loss, _lm_batch, None, 1e-6),
    "t5": Case(_t5, seq2seq_loss, _seq2seq_batch, r".*\.(q|v)", 1e-6),
    "mt5": Case(_mt5, seq2seq_loss, _seq2seq_batch, r".*\.(q|v)", 1e-6),
    "marian": Case(_marian, seq2seq_loss, _seq2seq_batch, r".*(q_proj|v_proj)"),
    "marian_separate": Case(_marian_separate, seq2seq_loss, _seq2seq_batch, r".*(q_proj|v_proj)"),
    "m2m_100": Case(_m2m_100, seq2seq_loss, _seq2seq_batch, r".*(q_proj|v_proj)"),
    "mbart": Case(_mbart, seq2seq_loss, _seq2seq_batch, r".*(q_proj|v_proj)"),
    "bart": Case(_bart, seq2seq_loss, _seq2seq_batch, r".*(q_proj|v_proj)"),
    "vit": Case(_vit, classification_loss, _image_batch, r".*(q_proj|v_proj|query|value)"),
    "deit": Case(_deit, classification_loss, _image_batch, r".*(q_proj|v_proj|query|value)"),
    "resnet": Case(_resnet, classification_loss, _image_batch),
    "efficientnet": Case(_efficientnet, classification_loss, _image_batch),
    "resnet_group_norm": Case(_resnet_group_norm, classification_loss, _image_batch),
    "efficientnet_group_norm": Case(_efficientnet_group_norm, classification_loss, _image_batch),
    "convnext": Case(_convnext, classification_loss, _image_batch),
    "groupnorm": Case(_GroupNormNet, classification_loss, _image_batch),
}


def build(
    name: str, *, lora: bool = False, dtype: torch.dtype = torch.float64, checkpointing: bool = False
) -> nn.Module:
    """The model in eval mode (no dropout), every parameter random, so that no gradient is zero by initialization."""
    torch.manual_seed(0)
    model = CASES[name].build()
    if lora:
        config = LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=CASES[name].lora_targets,
            init_lora_weights=False,
            fan_in_fan_out=name == "gpt2",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a deprecated name
            model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(dtype).eval()
    if checkpointing:
        train_without_dropout(model)  # transformers checkpoints in training mode only
        base = model.get_base_model() if lora else model
        base.activation_checkpointing_enable()
    return model


def train_without_dropout(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("attention_dropout", "dropout", "dropout_prob", "activation_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def to_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
