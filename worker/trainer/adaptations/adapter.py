"""What an adaptation is to the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from worker.trainer.families.interface import Family


def _nothing(model: PreTrainedModel) -> None:
    """Nothing to undo."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """parameters: (model, family, the catalog's adaptation) → names of what trains besides the head; may add modules
    that do not change the model's answers yet.
    merge: folds what was added back into the model's own parameters. with_head: whether the head trains, too.
    """

    parameters: Callable[[PreTrainedModel, Family, Any], list[str]]
    merge: Callable[[PreTrainedModel], None] = _nothing
    with_head: bool = True
