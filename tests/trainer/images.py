"""Tiny random image classifiers, and pictures that are dark or bright."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    BitConfig,
    BitForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

_TRANSFORMER: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 16, "num_labels": 5,
}  # fmt: skip


def _model(family: str) -> PreTrainedModel:
    """With a head of five other classes, as a pretrained base has one."""
    torch.manual_seed(3)
    if family == "vit":
        return ViTForImageClassification(ViTConfig(**_TRANSFORMER))
    if family == "deit":
        return DeiTForImageClassification(DeiTConfig(**_TRANSFORMER))
    if family == "convnext":
        return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2,
                                                             num_labels=5))  # fmt: skip
    if family == "resnet":
        return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                                         num_labels=5))  # fmt: skip
    if family == "bit":
        sizes: dict[str, Any] = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 8}
        return BitForImageClassification(BitConfig(**sizes, num_labels=5))
    return EfficientNetForImageClassification(
        EfficientNetConfig(
            image_size=32, hidden_dim=1280, num_block_repeats=[1, 1], kernel_sizes=[3, 3], in_channels=[32, 16],
            out_channels=[16, 24], depthwise_padding=[], strides=[1, 2], expand_ratios=[1, 6], num_labels=5,
            width_coefficient=1.0, depth_coefficient=1.0,
            initializer_range=1.5,  # with the usual one a random net's vectors are too small to tell images apart
        )
    )  # fmt: skip


def make_image_base(folder: Path, family: str) -> Path:
    """With what its processor needs, as plain transformers saves it."""
    _model(family).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_resize": true,'
        ' "do_rescale": true, "do_normalize": true, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    return folder


def picture(bright: bool, seed: int) -> bytes:
    """A PNG of 20 × 24 noisy pixels."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 120, (24, 20, 3)) + (120 if bright else 0)
    encoded = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(encoded, format="PNG")
    return encoded.getvalue()
