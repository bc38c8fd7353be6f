"""The task types that the trainer can execute, by the catalog's type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.interface import TrainerTask
from worker.trainer.tasks.language_modeling import LanguageModeling
from worker.trainer.tasks.text_classification import TextClassification

TRAINER_TASKS: dict[str, Callable[[TaskSpec, Path, int], TrainerTask]] = {
    "text_classification": TextClassification,
    "language_modeling": LanguageModeling,
}
