"""GroupNorm in place of BatchNorm: a base's layers are replaced, and transformers is told of the classes.

What a bundle brings as `modeling_group_norm.py` is what this process runs itself: the classes are registered, so that
transformers takes them for their `model_type` and no file of a folder is executed, whatever its config.json names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from worker.trainer.failure import TrainerFailure
from worker.trainer.families.modeling_group_norm import (
    EfficientNetGroupNormConfig,
    EfficientNetGroupNormForImageClassification,
    ResNetGroupNormConfig,
    ResNetGroupNormForImageClassification,
)

_CLASSES: tuple[tuple[type[Any], type[Any]], ...] = (
    (ResNetGroupNormConfig, ResNetGroupNormForImageClassification),
    (EfficientNetGroupNormConfig, EfficientNetGroupNormForImageClassification),
)

RESNET_TYPE, EFFICIENTNET_TYPE = (config.model_type for config, _ in _CLASSES)

for _config, _model in _CLASSES:
    AutoConfig.register(_config.model_type, _config)
    AutoModelForImageClassification.register(_config, _model)
    # Saving one then writes its file, and `auto_map` into config.json.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForImageClassification")

#: What the new configuration says of itself.
_OWN_KEYS = ("model_type", "architectures", "transformers_version", "auto_map", "group_norm_layers")


def with_group_norm(model: PreTrainedModel, trained: Callable[[PreTrainedModel], Sequence[str]]) -> PreTrainedModel:
    """The model with GroupNorm in place of each BatchNorm that then trains, with its γ, β and statistics.

    trained: names of the parameters that train in a model, of those that GroupNorm has where BatchNorm was too. A norm
    that would not train stays what the pretrained weights around it are used to. The model itself, where it has no
    BatchNorm left. Raises TrainerFailure `base_model_invalid`, `nothing_to_train`.
    """
    found = [classes for classes in _CLASSES if issubclass(classes[0], type(model.config))]
    if not found:
        raise TrainerFailure("base_model_invalid", "a base of this family has no BatchNorm to replace")
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return model
    owners = {name.rpartition(".")[0] for name in trained(_replaced(model, norms, *found[0]))}
    chosen = [name for name in norms if name in owners]
    if not chosen:
        raise TrainerFailure("nothing_to_train", "no norm would train")
    return _replaced(model, chosen, *found[0])


def _replaced(model: PreTrainedModel, norms: list[str], config: Any, kind: Any) -> PreTrainedModel:
    """A copy as `kind`, with these and the norms that were replaced before."""
    said = {name: value for name, value in model.config.to_dict().items() if name not in _OWN_KEYS}
    before = getattr(model.config, "group_norm_layers", ())
    made: PreTrainedModel = kind(config(**said, group_norm_layers=[*before, *norms]))
    made.load_state_dict(model.state_dict(), strict=True)
    made.requires_grad_(False)
    made.train(False)
    return made
