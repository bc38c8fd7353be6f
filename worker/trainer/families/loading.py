"""Loading a base by transformers: local files, safetensors, nothing that runs code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from worker.trainer.failure import TrainerFailure
from worker.trainer.spec import TaskSpec

#: The key of config.json that holds what `marker` gives back. `app.models.model_folder` reads it, too.
_MARKER = "privtune"


def load_base(
    path: Path,
    auto_class: Any,
    model_type: str,
    *,
    new: Callable[[PreTrainedConfig], tuple[str, ...]],
) -> PreTrainedModel:
    """The base in float32, on the CPU, in evaluation mode, without gradients.

    new: changes the configuration as the task needs it; the beginnings of the names of the parameters that the weights
    need not hold, or hold for another number of classes.
    Raises TrainerFailure `base_model_invalid` where another one is missing or of another shape, or the type is another.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if config.model_type != model_type:
            raise ValueError(f"config.json is of type {config.model_type}")
        allowed = new(config)
        model: PreTrainedModel
        model, info = auto_class.from_pretrained(
            path,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of the head alone, as is checked below
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise TrainerFailure("base_model_invalid", str(error)) from error
    missing = [name for name in info["missing_keys"] if not name.startswith(allowed)]
    mismatched = [name for name, *_ in info["mismatched_keys"] if not name.startswith(allowed)]
    if missing or mismatched:
        raise TrainerFailure("base_model_invalid", f"missing {missing}, mismatched {mismatched}")
    model.requires_grad_(False)
    model.train(False)
    return model


def names_in_files(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """The model's parameters → what they are called in a checkpoint; transformers has renamed some since. A tied
    weight may stand there under each of its names, of which its own is the first."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        (in_file,) = revert_weight_conversion(model, {name: parameter})
        aliases.setdefault(id(parameter), []).append(in_file)
    return {name: tuple(aliases[id(parameter)]) for name, parameter in model.named_parameters()}


def marker(config: PreTrainedConfig) -> dict[str, Any]:
    """What a job of this service noted in the configuration of its model, for the job that starts from it: `task`, and
    `pooling_layer`, whether the model has one already. {} of any other model."""
    noted = getattr(config, _MARKER, None)
    return dict(noted) if isinstance(noted, dict) else {}


def note(config: PreTrainedConfig, **facts: Any) -> None:
    """Adds to the marker. Plain transformers passes over it."""
    setattr(config, _MARKER, {**marker(config), **facts})


def name_classes(config: PreTrainedConfig, task: TaskSpec) -> bool:
    """Writes the job's classes, or a single number as its output, into the configuration.

    True where the base was trained for just these by the same task: its head is then not replaced, but trained further.
    """
    if not task.labels:  # one number: the range that it was scaled to is another job's
        config.num_labels = 1
        config.problem_type = "regression"
        note(config, task=task.type)
        return False
    several = bool(task.options.get("multi_label"))
    kind: Any = "multi_label_classification" if several else "single_label_classification"
    names: dict[Any, str] = dict(config.id2label or {})
    known = tuple(names.get(index) for index in range(len(names)))
    same_task = (marker(config).get("task"), getattr(config, "problem_type", None)) == (task.type, kind)
    continues = same_task and known == task.labels
    config.problem_type = kind
    note(config, task=task.type)
    config.id2label = dict(enumerate(task.labels))
    config.label2id = {label: index for index, label in enumerate(task.labels)}
    return continues
