"""Architectures that a base may have: where its config keeps its sizes, what it can learn, which keys its class reads.

A family here has its file in `worker/trainer/families`, by the same `model_type`; a contract test holds the two
together, and the keys to transformers' own config classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from app.catalog.tasks import TASKS

Kind = Literal["encoder", "causal", "seq2seq", "image"]

#: What each kind of architecture can learn, most usual first; those that this service trains count.
TASKS_OF_KIND: dict[Kind, tuple[str, ...]] = {
    "encoder": ("text_classification", "text_regression", "token_classification", "masked_lm"),
    "causal": ("chat", "instruction", "language_modeling"),
    "seq2seq": ("text_to_text", "translation", "summarization"),
    "image": ("image_classification",),
}

#: The file of classes that transformers lacks, in `worker/trainer/families` and in the bundles that need it.
GROUP_NORM_CODE = "modeling_group_norm.py"

#: Keys that every config of transformers knows, and the trainer's own.
COMMON_KEYS = frozenset(
    {
        "architectures", "chunk_size_feed_forward", "dtype", "is_encoder_decoder", "model_type", "problem_type",
        "torch_dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
        "initializer_range", "use_cache", "vocab_size", "decoder_start_token_id", "forced_bos_token_id",
        "forced_eos_token_id", "tokenizer_class", "id2label", "label2id", "privtune",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """hidden_size, num_layers, max_length: names of the config's keys; max_length "" where inputs have no limit.

    position_offset: position embeddings that no token takes. unlimited: the length that is offered then.
    position_table: positions are learnt, so that there is a weight of them; extra_positions: rows that it has besides.
    keys: what the family's config class reads besides `COMMON_KEYS`.
    head: a tensor of the head that comes with the weights for predicting tokens; where `tied` (unless the config says
      otherwise) it is the embedding. Of an encoder it is not, and often missing.
    lora: whether it has matrices for LoRA; nets of convolutions have none.
    body: beginnings of the names of the body's weights in its files, behind the name of the body itself, if that is
      there. pretrained_head: the same of the head that predicts tokens. fixed: ends of names of what never trains.
    sentencepiece: the files that its tokenizer is made from where there is no tokenizer.json, as hubs have them.
    language_tokens: whether both texts have a token of their language, so that it can only translate.
    batch_norm: whether it has BatchNorm, or had it before a job of this service replaced it.
    auto_map: of an architecture that transformers lacks, the classes that a bundle of ours brings in a file of its own,
      as its config.json names them.
    centred: whether its pooled vectors are centred by a privately released mean (see the trainer's encoders).
    """

    model_type: str
    kind: Kind
    hidden_size: str
    num_layers: str
    max_length: str
    keys: frozenset[str]
    body: tuple[str, ...]
    position_offset: int = 0
    position_table: bool = True
    extra_positions: int = 0
    unlimited: int = 512
    centred: bool = False
    lora: bool = True
    batch_norm: bool = False
    auto_map: Mapping[str, str] = field(default_factory=dict)
    head: str = ""
    tied: bool = True
    pretrained_head: tuple[str, ...] = ("lm_head.",)
    fixed: tuple[str, ...] = ()
    sentencepiece: tuple[str, ...] = ()
    language_tokens: bool = False

    @property
    def attentive(self) -> bool:
        """Whether an attention can weigh its tokens for a head."""
        return self.kind == "encoder"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Of the kind's tasks those that this service trains."""
        names = ("translation",) if self.language_tokens else TASKS_OF_KIND[self.kind]
        return tuple(name for name in names if name in TASKS)


_BERT_KEYS = frozenset(
    {
        "add_cross_attention", "attention_probs_dropout_prob", "classifier_dropout", "hidden_act",
        "hidden_dropout_prob", "hidden_size", "intermediate_size", "is_decoder", "layer_norm_eps",
        "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "type_vocab_size",
    }
)  # fmt: skip


_DISTILBERT_KEYS = frozenset(
    {
        "activation", "attention_dropout", "dim", "dropout", "hidden_dim", "max_position_embeddings", "n_heads",
        "n_layers", "qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds",
    }
)  # fmt: skip


#: Of models that write text.
_HEAD = "lm_head.weight"


def _bert(model_type: str, position_offset: int = 0) -> Family:
    return Family(
        model_type,
        "encoder",
        "hidden_size",
        "num_hidden_layers",
        "max_position_embeddings",
        _BERT_KEYS,
        ("embeddings.", "encoder.layer."),
        position_offset,
        centred=True,
        head="cls.predictions.transform.dense.weight" if model_type == "bert" else "lm_head.dense.weight",
        tied=False,
        pretrained_head=("cls.predictions.",) if model_type == "bert" else ("lm_head.",),
    )


_GPT2_KEYS = frozenset(
    {
        "activation_function", "add_cross_attention", "attn_pdrop", "embd_pdrop", "layer_norm_epsilon", "n_ctx",
        "n_embd", "n_head", "n_inner", "n_layer", "n_positions", "reorder_and_upcast_attn", "resid_pdrop",
        "scale_attn_by_inverse_layer_idx", "scale_attn_weights", "summary_activation", "summary_first_dropout",
        "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
    }
)  # fmt: skip

_LLAMA_KEYS = frozenset(
    {
        "attention_bias", "attention_dropout", "head_dim", "hidden_act", "hidden_size", "intermediate_size",
        "max_position_embeddings", "mlp_bias", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
        "pretraining_tp", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    }
)  # fmt: skip

#: Of both; neither slides its window in the checkpoints that are small enough for this service.
_QWEN_KEYS = _LLAMA_KEYS | {"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"}

_T5_KEYS = frozenset(
    {
        "classifier_dropout", "d_ff", "d_kv", "d_model", "dense_act_fn", "dropout_rate", "feed_forward_proj",
        "initializer_factor", "is_decoder", "is_gated_act", "layer_norm_epsilon", "n_positions", "num_decoder_layers",
        "num_heads", "num_layers", "output_past", "relative_attention_max_distance", "relative_attention_num_buckets",
        "scale_decoder_outputs", "task_specific_params",
    }
)  # fmt: skip

#: Of old files: never read.
_T5_FIXED = ("EncDecAttention.relative_attention_bias.weight",)

_BART_KEYS = frozenset(
    {
        "activation_dropout", "activation_function", "attention_dropout", "classifier_dropout", "d_model",
        "decoder_attention_heads", "decoder_ffn_dim", "decoder_layerdrop", "decoder_layers", "dropout",
        "encoder_attention_heads", "encoder_ffn_dim", "encoder_layerdrop", "encoder_layers", "init_std", "is_decoder",
        "max_position_embeddings", "num_hidden_layers", "scale_embedding", "task_specific_params",
    }
)  # fmt: skip

_MARIAN_KEYS = _BART_KEYS | {"decoder_vocab_size", "share_encoder_decoder_embeddings", "static_position_embeddings"}


#: Of XLM-R, mBART and M2M-100; NLLB-200 comes with tokenizer.json.
_ONE_FILE = ("sentencepiece.bpe.model",)


def _seq2seq(
    model_type: str,
    keys: frozenset[str],
    *,
    table: bool = False,
    unlimited: bool = False,
    fixed: tuple[str, ...] = (),
    sentencepiece: tuple[str, ...] = (),
    language_tokens: bool = False,
) -> Family:
    """table: positions are learnt. BART and mBART keep two rows of them besides."""
    return Family(
        model_type,
        "seq2seq",
        "d_model",
        "num_layers" if unlimited else "encoder_layers",
        "" if unlimited else "max_position_embeddings",
        keys,
        ("shared.", "encoder.", "decoder."),
        position_table=table,
        extra_positions=2 if table else 0,
        head=_HEAD,
        fixed=fixed,
        sentencepiece=sentencepiece,
        language_tokens=language_tokens,
    )


def _rotary(model_type: str, keys: frozenset[str]) -> Family:
    """A causal model whose positions are rotations."""
    return Family(
        model_type,
        "causal",
        "hidden_size",
        "num_hidden_layers",
        "max_position_embeddings",
        keys,
        ("embed_tokens.", "layers.", "norm."),
        position_table=False,
        head=_HEAD,
        tied=False,
    )


_VIT_KEYS = frozenset(
    {
        "attention_probs_dropout_prob", "encoder_stride", "hidden_act", "hidden_dropout_prob", "hidden_size",
        "image_size", "intermediate_size", "layer_norm_eps", "num_attention_heads", "num_channels",
        "num_hidden_layers", "patch_size", "pooler_act", "pooler_output_size", "qkv_bias",
    }
)  # fmt: skip

_CONVNEXT_KEYS = frozenset(
    {
        "depths", "drop_path_rate", "hidden_act", "hidden_sizes", "image_size", "layer_norm_eps",
        "layer_scale_init_value", "num_channels", "num_stages", "out_features", "out_indices", "patch_size",
        "stage_names",
    }
)  # fmt: skip

_RESNET_KEYS = frozenset(
    {
        "depths", "downsample_in_bottleneck", "downsample_in_first_stage", "embedding_size", "hidden_act",
        "hidden_sizes", "layer_type", "num_channels", "out_features", "out_indices", "stage_names",
    }
)  # fmt: skip

_BIT_KEYS = frozenset(
    {
        "depths", "drop_path_rate", "embedding_dynamic_padding", "embedding_size", "global_padding", "hidden_act",
        "hidden_sizes", "layer_type", "num_channels", "num_groups", "out_features", "out_indices", "output_stride",
        "stage_names", "width_factor",
    }
)  # fmt: skip

_EFFICIENTNET_KEYS = frozenset(
    {
        "batch_norm_eps", "batch_norm_momentum", "depth_coefficient", "depth_divisor", "depthwise_padding",
        "drop_connect_rate", "dropout_rate", "expand_ratios", "hidden_act", "hidden_dim", "image_size", "in_channels",
        "kernel_sizes", "num_block_repeats", "num_channels", "num_hidden_layers", "out_channels", "pooling_type",
        "squeeze_expansion_ratio", "strides", "width_coefficient",
    }
)  # fmt: skip


def _image(
    model_type: str,
    hidden_size: str,
    num_layers: str,
    keys: frozenset[str],
    body: tuple[str, ...] = ("embeddings.", "encoder.", "layernorm."),
    **facts: Any,
) -> Family:
    """An image is one piece, whatever its size."""
    return Family(
        model_type, "image", hidden_size, num_layers, "", keys, body, position_table=False, unlimited=1, **facts
    )


def _with_group_norm(family: Family, name: str) -> Family:
    """What a job makes of the family by replacing BatchNorm. name: of its classes."""
    module = GROUP_NORM_CODE.removesuffix(".py")
    return dataclasses.replace(
        family,
        model_type=f"{family.model_type}_group_norm",
        keys=family.keys | {"group_norm_layers"},
        auto_map={
            "AutoConfig": f"{module}.{name}GroupNormConfig",
            "AutoModelForImageClassification": f"{module}.{name}GroupNormForImageClassification",
        },
    )


#: Of nets of convolutions.
_EMBEDDER = ("embedder.", "encoder.", "norm.")
_RESNET = _image("resnet", "hidden_sizes", "depths", _RESNET_KEYS, _EMBEDDER, lora=False, batch_norm=True)
_EFFICIENTNET = _image(
    "efficientnet", "hidden_dim", "num_block_repeats", _EFFICIENTNET_KEYS, lora=False, batch_norm=True
)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _bert("bert"),
        _bert("roberta", position_offset=2),  # positions start behind the padding index, which is 1
        dataclasses.replace(_bert("xlm-roberta", position_offset=2), sentencepiece=_ONE_FILE),
        _image("vit", "hidden_size", "num_hidden_layers", _VIT_KEYS),
        _image("deit", "hidden_size", "num_hidden_layers", _VIT_KEYS),
        _image("convnext", "hidden_sizes", "depths", _CONVNEXT_KEYS),
        _RESNET,
        _with_group_norm(_RESNET, "ResNet"),
        _image("bit", "hidden_sizes", "depths", _BIT_KEYS, _EMBEDDER, lora=False),
        _EFFICIENTNET,
        _with_group_norm(_EFFICIENTNET, "EfficientNet"),
        Family(
            "distilbert",
            "encoder",
            "dim",
            "n_layers",
            "max_position_embeddings",
            _DISTILBERT_KEYS,
            ("embeddings.", "transformer.layer."),
            centred=True,
            head="vocab_transform.weight",
            tied=False,
            pretrained_head=("vocab_",),
        ),
        Family(
            "gpt2",
            "causal",
            "n_embd",
            "n_layer",
            "n_positions",
            _GPT2_KEYS,
            ("wte.", "wpe.", "h.", "ln_f."),
            head=_HEAD,
            fixed=(".attn.bias", ".attn.masked_bias"),  # who sees whom, in old files
        ),
        _rotary("llama", _LLAMA_KEYS),
        _rotary("qwen2", _QWEN_KEYS),
        _rotary("qwen3", _QWEN_KEYS),
        _seq2seq("t5", _T5_KEYS, unlimited=True, fixed=_T5_FIXED, sentencepiece=("spiece.model",)),
        _seq2seq("mt5", _T5_KEYS, unlimited=True, fixed=_T5_FIXED, sentencepiece=("spiece.model",)),
        _seq2seq("bart", _BART_KEYS, table=True),
        _seq2seq("marian", _MARIAN_KEYS, fixed=("embed_positions.weight",), sentencepiece=("source.spm", "target.spm")),
        _seq2seq("mbart", _BART_KEYS, table=True, sentencepiece=_ONE_FILE, language_tokens=True),
        # Positions of old files are computed anew.
        _seq2seq(
            "m2m_100", _BART_KEYS, fixed=("embed_positions.weights",), sentencepiece=_ONE_FILE, language_tokens=True
        ),
    )
}
