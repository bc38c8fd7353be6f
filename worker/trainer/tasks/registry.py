"""The task types that the trainer can execute, by the catalog's type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.chat import Chat, Instruction
from worker.trainer.tasks.image_classification import ImageClassification
from worker.trainer.tasks.interface import TrainerTask
from worker.trainer.tasks.language_modeling import LanguageModeling
from worker.trainer.tasks.masked_lm import MaskedLanguageModeling
from worker.trainer.tasks.text_classification import TextClassification
from worker.trainer.tasks.text_regression import TextRegression
from worker.trainer.tasks.text_to_text import Summarization, TextToText, Translation
from worker.trainer.tasks.token_classification import TokenClassification

TRAINER_TASKS: dict[str, Callable[[TaskSpec, Path, int], TrainerTask]] = {
    "text_classification": TextClassification,
    "text_regression": TextRegression,
    "token_classification": TokenClassification,
    "image_classification": ImageClassification,
    "language_modeling": LanguageModeling,
    "masked_lm": MaskedLanguageModeling,
    "chat": Chat,
    "instruction": Instruction,
    "text_to_text": TextToText,
    "translation": Translation,
    "summarization": Summarization,
}
