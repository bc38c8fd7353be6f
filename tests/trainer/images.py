"""Tiny random image classifiers, and pictures that are dark or bright."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
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

from app.catalog.families import GROUP_NORM_CODE
from tests.trainer.jobs import MadeJob, make_job
from worker.trainer.families.group_norm import with_group_norm
from worker.trainer.spec import TaskSpec

TASK = TaskSpec("image_classification", {"image": "scan", "label": "finding"}, ("dark", "bright"), max_length=1)

_TRANSFORMER: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 16, "num_labels": 5,
}  # fmt: skip


def _model(family: str) -> PreTrainedModel:
    """With a head of five other classes, as a pretrained base has one."""
    if family.endswith("_group_norm"):
        model = _model(family.removesuffix("_group_norm"))
        return with_group_norm(model, lambda made: [name for name, _ in made.named_parameters()])
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
    """With what its processor needs, as plain transformers saves it; without code, as an operator's folder is."""
    _model(family).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    if config.pop("auto_map", None):
        (folder / "config.json").write_text(json.dumps(config))
        (folder / GROUP_NORM_CODE).unlink()
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


def make_image_job(folder: Path, base: tuple[str, Path], **how: Any) -> MadeJob:
    """A job folder of 40 pictures, on a base of that family."""
    made = make_job(folder, base[1], family=base[0], task=TASK, data=[("", "")] * 40, **how)
    table = {"scan": [picture(n % 2 == 1, n) for n in range(40)], "finding": [TASK.labels[n % 2] for n in range(40)]}
    pq.write_table(pa.table(table), folder / "data/training.parquet")
    return made


#: A user's process: transformers, torch, folders; nothing of ours can be imported.
_ELSEWHERE = """
import importlib.util, json, pathlib, sys
inputs, *folders = sys.argv[1:]
sys.path[:] = [entry for entry in sys.path if not (pathlib.Path(entry) / "worker").exists()]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
for package in ("app", "worker"):
    assert importlib.util.find_spec(package) is None, package
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
torch.set_num_threads(1)
pixels = torch.load(inputs + "/pixels.pt", weights_only=True)
pictures = [Image.open(f"{inputs}/{number}.png") for number in range(len(pixels))]
told = []
for folder in folders:
    try:
        AutoModelForImageClassification.from_pretrained(folder)
        without = "loaded"
    except Exception as error:
        without = type(error).__name__
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    with torch.inference_mode():
        logits = model(pixels).logits
    run = pipeline("image-classification", model=folder, trust_remote_code=True)
    named = [answer[0]["label"] for answer in run(pictures)]
    told.append({"logits": logits.tolist(), "id2label": model.config.id2label, "pipeline": named,
                 "without_trust": without})
print()
print(json.dumps(told))
"""


def answers_elsewhere(bundles: list[Path], pixels: Tensor, scratch: Path) -> list[dict[str, Any]]:
    """What a process without privtune makes of bundles that bring code: `logits` of the pixels, `id2label`, and of
    pictures 1000 and on the `pipeline`'s classes; without_trust: the error of who does not allow the code."""
    inputs = scratch / "elsewhere"
    inputs.mkdir()
    torch.save(pixels, inputs / "pixels.pt")
    for number in range(len(pixels)):
        (inputs / f"{number}.png").write_bytes(picture(number % 2 == 1, 1000 + number))
    env = {"PATH": os.environ["PATH"], "HOME": str(scratch), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", _ELSEWHERE, str(inputs), *map(str, bundles)],
        env={**env, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers
