"""ResNet and EfficientNet for image classification, with GroupNorm (Wu & He 2018) in place of BatchNorm.

transformers has neither, so a model's folder that needs this file holds it: `auto_map` in its config.json names the
classes below, and `AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)` runs it. It imports
torch and transformers, and nothing else.

`group_norm_layers` in config.json lists the layers that were replaced, by their names in the model; other BatchNorm
layers stay as they are. The weights have the names and shapes that they have with BatchNorm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

MOST_GROUPS = 32
#: The paper's other setting. Of a smaller group more is lost: one of a single channel says nothing of its strength.
LEAST_CHANNELS = 16


def num_groups(num_channels: int) -> int:
    """The most groups, of equal size, of at least `LEAST_CHANNELS` channels; one where there are not so many."""
    counts = range(1, min(MOST_GROUPS, num_channels // LEAST_CHANNELS) + 1)
    return max((count for count in counts if num_channels % count == 0), default=1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of what a BatchNorm's statistics have standardized, of the shape (rows, channels, height, width).

    The statistics are constants of the pretrained model and are never updated: each row is normalized by itself.
    Without them the channels of a group would differ in scale as the pretrained convolutions leave them.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_channels: int, eps: float) -> None:
        super().__init__(num_groups(num_channels), num_channels, eps=eps)
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.batch_norm(input, self.running_mean, self.running_var, eps=self.eps))


def replace_batch_norm(model: nn.Module, names: Sequence[str]) -> None:
    """Puts a new `GroupNorm` at each of these names. Raises ValueError where one is not a BatchNorm layer's."""
    modules = dict(model.named_modules())
    for name in names:
        replaced = modules.pop(name, None)
        if not isinstance(replaced, nn.BatchNorm2d):
            raise ValueError(f"group_norm_layers: {name} is no BatchNorm layer")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, GroupNorm(replaced.num_features, replaced.eps))


class ResNetGroupNormConfig(ResNetConfig):
    model_type = "resnet_group_norm"
    group_norm_layers: list[str] | tuple[str, ...] = ()


class ResNetGroupNormForImageClassification(ResNetForImageClassification):
    config_class = ResNetGroupNormConfig

    def __init__(self, config: ResNetGroupNormConfig) -> None:
        super().__init__(config)
        replace_batch_norm(self, config.group_norm_layers)


class EfficientNetGroupNormConfig(EfficientNetConfig):
    model_type = "efficientnet_group_norm"
    group_norm_layers: list[str] | tuple[str, ...] = ()


class EfficientNetGroupNormForImageClassification(EfficientNetForImageClassification):
    config_class = EfficientNetGroupNormConfig

    def __init__(self, config: EfficientNetGroupNormConfig) -> None:
        super().__init__(config)
        replace_batch_norm(self, config.group_norm_layers)
