"""Loading a base by transformers: local files, safetensors, nothing that runs code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from worker.trainer.failure import TrainerFailure
from worker.trainer.spec import TaskSpec


def load_base(
    path: Path,
    auto_class: Any,
    model_type: str,
    *,
    new: Callable[[PreTrainedConfig], tuple[str, ...]],
) -> PreTrainedModel:
    """The base in float32, on the CPU, in evaluation mode, without gradients.

    new: changes the configuration as the task needs it; the beginnings of the names of the parameters that the weights
    need not hold. Raises TrainerFailure `base_model_invalid` where another one is missing, or the type is another.
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
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise TrainerFailure("base_model_invalid", str(error)) from error
    missing = [name for name in info["missing_keys"] if not name.startswith(allowed)]
    if missing or info["mismatched_keys"]:
        raise TrainerFailure("base_model_invalid", f"missing {missing}, mismatched {info['mismatched_keys']}")
    model.requires_grad_(False)
    model.train(False)
    return model


def name_classes(config: PreTrainedConfig, task: TaskSpec) -> None:
    """Writes the job's classes into the configuration."""
    config.id2label = dict(enumerate(task.labels))
    config.label2id = {label: index for index, label in enumerate(task.labels)}
