"""The task types that the trainer can execute, by the catalog's type."""

from __future__ import annotations

from worker.trainer.tasks.text_classification import TextClassification

TRAINER_TASKS: dict[str, type[TextClassification]] = {"text_classification": TextClassification}
