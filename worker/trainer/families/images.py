"""Architectures for images: a body that gives one vector an image, and a linear classifier on it.

BatchNorm stays in evaluation mode and untrained in every adaptation: with fixed statistics it treats each image by
itself, and what it would learn of a batch would couple images. Where a job asks for it, GroupNorm takes its place, and
trains (`group_norm.py`). Squeeze-and-excitation stays frozen too: where a base has none (EfficientNet-Lite), its gates
are held open by these weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from worker.trainer.families.group_norm import EFFICIENTNET_TYPE, RESNET_TYPE
from worker.trainer.families.loading import load_base, name_classes
from worker.trainer.spec import TaskSpec


def _first_token(output: Any) -> Tensor:
    hidden: Tensor = output.last_hidden_state
    return hidden[:, 0]


def _average(output: Any) -> Tensor:
    pooled: Tensor = output.pooler_output
    return pooled.flatten(1)


@dataclass(frozen=True, slots=True)
class ImageFamily:
    """Where such a model keeps its parts, as attribute paths.

    stack: the list of blocks or stages. head: the linear classifier. vector: what the head reads of the body's output.
    frozen: parts of names of parameters that no adaptation trains. architecture: the class to load, of several that
    transformers has; the config says which of them it was made with.
    """

    auto_class: ClassVar[Any] = AutoModelForImageClassification
    centres: ClassVar[bool] = False

    model_type: str
    body: str
    stack: str
    head: str = "classifier"
    vector: Callable[[Any], Tensor] = _average
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    unmovable: tuple[str, ...] = ()
    frozen: tuple[str, ...] = (".squeeze_excite.",)
    architecture: str = ""

    def load(self, path: Path, task: TaskSpec) -> PreTrainedModel:
        """The base with a zero head, or the head of an earlier job for the same classes; see `Family.load`.

        The head that the base was pretrained with has other classes: it is replaced whatever its size.
        """
        continues = False

        def new(config: PreTrainedConfig) -> tuple[str, ...]:
            nonlocal continues
            continues = name_classes(config, task)
            if self.architecture:
                config.architectures = [self.architecture]
            return (f"{self.head}.",)

        model = load_base(path, self.auto_class, self.model_type, new=new)
        if not continues:
            with torch.no_grad():
                for name in self.head_parameters(model):
                    model.get_parameter(name).zero_()
        return model

    def max_length(self, model: PreTrainedModel) -> int:
        """An image is one piece."""
        return 1

    def head_module(self, model: nn.Module) -> nn.Linear:
        """The classifier."""
        head = model.get_submodule(self.head)
        assert isinstance(head, nn.Linear)
        return head

    def head_parameters(self, model: nn.Module) -> list[str]:
        """The classifier's."""
        return [f"{self.head}.{name}" for name, _ in self.head_module(model).named_parameters()]

    def body_parameters(self, model: nn.Module, *, last_layers: int | None = None) -> list[str]:
        """All but the head, BatchNorm and what is `frozen`, or of these the last blocks'."""
        normed = tuple(
            f"{name}." for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
        )
        names = [
            name
            for name, _ in model.named_parameters()
            if not name.startswith((f"{self.head}.", *normed)) and not any(part in name for part in self.frozen)
        ]
        if last_layers is None:
            return names
        depth = len(model.get_submodule(self.stack))  # type: ignore[arg-type]
        kept = tuple(f"{self.stack}.{index}." for index in range(max(0, depth - last_layers), depth))
        return [name for name in names if name.startswith(kept)]

    def pooled(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The body's vectors, (rows, width)."""
        return self.vector(model.get_submodule(self.body)(batch["pixel_values"])).float()

    def set_centre(self, model: nn.Module, centre: Tensor) -> None:
        """There is none to set: a plain classifier has no place for it."""
        raise NotImplementedError

    def features(self, model: nn.Module, pooled: Tensor) -> Tensor:
        """The vectors themselves."""
        return pooled


VIT = ImageFamily("vit", "vit", "vit.layers", vector=_first_token, unmovable=("attention.k_proj.bias",))
#: Distilled ones have two heads, whose mean is the answer; here one takes their place.
DEIT = dataclasses.replace(
    VIT, model_type="deit", body="deit", stack="deit.layers", architecture="DeiTForImageClassification"
)
CONVNEXT = ImageFamily("convnext", "convnext", "convnext.encoder.stages", lora_targets=("pwconv1", "pwconv2"))
RESNET = ImageFamily("resnet", "resnet", "resnet.encoder.stages", head="classifier.1")
#: What jobs of this service made of a ResNet.
RESNET_GROUP_NORM = dataclasses.replace(RESNET, model_type=RESNET_TYPE)
#: A ResNet with GroupNorm in place of BatchNorm, which trains (Kolesnikov et al. 2020).
BIT = ImageFamily("bit", "bit", "bit.encoder.stages", head="classifier.1")
EFFICIENTNET = ImageFamily("efficientnet", "efficientnet", "efficientnet.encoder.blocks")
EFFICIENTNET_GROUP_NORM = dataclasses.replace(EFFICIENTNET, model_type=EFFICIENTNET_TYPE)
