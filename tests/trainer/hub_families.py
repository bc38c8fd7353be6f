"""Bases of every family in the layout that hubs have them in: tokenizers as lists, bfloat16, shards, old names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer

from tests.trainer.hub_folders import pieces
from tests.trainer.jobs import BAD, FILLER, GOOD, rows

_TEXT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 34, "initializer_range": 0.5,
}  # fmt: skip
_IMAGE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 16, "num_labels": 5,
}  # fmt: skip
_PIXELS = {"do_normalize": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def _word_pieces(folder: Path) -> int:
    """vocab.txt alone, as for years; how many tokens."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return len(words)


def _merges(folder: Path, *special: str) -> int:
    """vocab.json and merges.txt."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator([text for text, _ in rows(60)], 280, special_tokens=list(special), show_progress=False)
    made.save_model(str(folder))
    return int(made.get_vocab_size())


def _roberta_tokens(folder: Path) -> int:
    return _merges(folder, "<s>", "<pad>", "</s>", "<unk>", "<mask>")


def _tokenizer_json(folder: Path, tokenizer: str, eos: str) -> int:
    """All three files, as Qwen has them, and what is said beside them."""
    size = _merges(folder, eos, "<|im_start|>", "<|im_end|>")
    made = hf.Qwen2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    made.save_pretrained(folder)
    added = {
        str(index): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "special": True}
        for index, token in enumerate((eos, "<|im_start|>", "<|im_end|>"))
    }
    said = {"tokenizer_class": tokenizer, "eos_token": "<|im_end|>", "pad_token": eos, "added_tokens_decoder": added}
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    more = {"chat_template": template, "bos_token": None, "unk_token": None, "errors": "replace"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, **more, "add_bos_token": False}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return size


def _bert(folder: Path) -> Any:
    """emilyalsentzer/Bio_ClinicalBERT's: nothing says how to read but vocab.txt."""
    return hf.BertForPreTraining(hf.BertConfig(vocab_size=_word_pieces(folder), **_TEXT))


def _distilbert(folder: Path) -> Any:
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    config = hf.DistilBertConfig(
        vocab_size=_word_pieces(folder), dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=34
    )
    return hf.DistilBertForMaskedLM(config)


def _roberta(folder: Path) -> Any:
    return hf.RobertaForMaskedLM(hf.RobertaConfig(vocab_size=_roberta_tokens(folder), **_TEXT))


def _xlm_roberta(folder: Path) -> Any:
    model = pieces([text for text, _ in rows(60)], vocab_size=60, bos_id=1)
    (folder / "sentencepiece.bpe.model").write_bytes(model)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size() + 2
    return hf.XLMRobertaForMaskedLM(hf.XLMRobertaConfig(vocab_size=size, **_TEXT))


def _gpt2(folder: Path) -> Any:
    """microsoft/DialoGPT-small's."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    end = {"bos_token_id": 0, "eos_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=_merges(folder, "<|endoftext|>"), **sizes, **end))


def _bart(folder: Path) -> Any:
    config = hf.BartConfig(
        vocab_size=_roberta_tokens(folder), d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=34, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_bos_token_id=0,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)


def _causal(kind: Any, config: Any, tokenizer: str, **more: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        size = _tokenizer_json(folder, tokenizer, "<|endoftext|>")
        sizes = {**_TEXT, "num_key_value_heads": 1, "max_position_embeddings": 64}
        return kind(config(vocab_size=size, **sizes, bos_token_id=0, eos_token_id=2, **more))

    return make


def _image(kind: Any, config: Any, *, sizes: dict[str, Any], **processor: Any) -> Callable[[Path], Any]:
    def make(folder: Path) -> Any:
        (folder / "preprocessor_config.json").write_text(json.dumps({**_PIXELS, **processor}))
        return kind(config(**sizes))

    return make


_EFFICIENTNET = {
    "image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 1.0, "num_block_repeats": [1, 1],
    "kernel_sizes": [3, 5], "in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2],
    "expand_ratios": [1, 2], "hidden_dim": 320, "num_labels": 5,
}  # fmt: skip
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}

MAKERS: dict[str, Callable[[Path], Any]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "roberta": _roberta,
    "xlm-roberta": _xlm_roberta,
    "gpt2": _gpt2,
    "bart": _bart,
    "llama": _causal(hf.LlamaForCausalLM, hf.LlamaConfig, "GPT2Tokenizer", tie_word_embeddings=True),
    "qwen2": _causal(hf.Qwen2ForCausalLM, hf.Qwen2Config, "Qwen2Tokenizer", tie_word_embeddings=True),
    "qwen3": _causal(hf.Qwen3ForCausalLM, hf.Qwen3Config, "Qwen2Tokenizer", tie_word_embeddings=True, head_dim=8),
    "vit": _image(
        hf.ViTForImageClassification, hf.ViTConfig, sizes=_IMAGE,
        image_processor_type="ViTFeatureExtractor", size=32, resample=2,
    ),
    "deit": _image(
        hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig, sizes=_IMAGE, do_center_crop=True,
        feature_extractor_type="DeiTFeatureExtractor", size=36, crop_size=32, resample=3,
    ),
    "convnext": _image(
        hf.ConvNextForImageClassification, hf.ConvNextConfig, sizes={**_STAGES, "num_stages": 2},
        feature_extractor_type="ConvNextFeatureExtractor", size=32, crop_pct=0.875, resample=3,
    ),
    "resnet": _image(
        hf.ResNetForImageClassification, hf.ResNetConfig, sizes={**_STAGES, "embedding_size": 8},
        image_processor_type="ConvNextImageProcessorFast", size={"shortest_edge": 32}, crop_pct=0.875, use_fast=True,
    ),
    "efficientnet": _image(
        hf.EfficientNetForImageClassification, hf.EfficientNetConfig, sizes=_EFFICIENTNET, rescale_offset=False,
        image_processor_type="EfficientNetImageProcessor", size={"height": 32, "width": 32}, include_top=True,
    ),
}  # fmt: skip

#: What configs of hubs say that no class of today reads.
_SAID: dict[str, dict[str, Any]] = {
    "bert": {"gradient_checkpointing": False, "position_embedding_type": "absolute"},
    "distilbert": {"tie_weights_": True, "n_heads": 2},
    "gpt2": {"n_ctx": 64, "task_specific_params": {"conversational": {"max_length": 1000}}},
    "llama": {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000},
    "qwen2": {"use_mrope": False, "sliding_window": 64, "use_sliding_window": False, "max_window_layers": 2,
              "rope_theta": 1000000.0},
    "qwen3": {"rope_theta": 1000000, "sliding_window": None, "attention_bias": False},
}  # fmt: skip


def make_hub_base(folder: Path, family: str) -> Path:
    """In bfloat16 where models of that kind are, in two shards; else one file with names of old."""
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    model = MAKERS[family](folder)
    shards = family in ("llama", "qwen2", "qwen3")
    model.to(torch.bfloat16 if shards else torch.float32)
    model.save_pretrained(folder, max_shard_size="9KB" if shards else "1GB")
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**config, **_SAID.get(family, {})}))
    weights = folder / "model.safetensors"
    if family == "gpt2":  # without the model's name, and with what is computed today
        tensors = {name.removeprefix("transformer."): value for name, value in load_file(weights).items()}
        mask = torch.ones(64, 64, dtype=torch.uint8).tril().view(1, 1, 64, 64)
        masks = {f"h.{block}.attn.bias": mask.clone() for block in range(2)}
        save_file({**tensors, **masks}, weights, {"format": "pt"})
    if family == "bert":  # as google-bert/bert-base-uncased has them
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        tensors = load_file(weights)
        for new, name in [(new, name) for name in tensors for new in old if name.endswith(new)]:
            tensors[name.replace(new, old[new])] = tensors.pop(name)
        save_file({**tensors, "bert.embeddings.position_ids": torch.arange(34)[None]}, weights, {"format": "pt"})
    return folder
