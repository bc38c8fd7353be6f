"""Text classification: a text or a pair of texts; one of a declared list of classes, or any number of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.trainer.failure import TrainerFailure
from worker.trainer.tasks.confusion import (
    binary_cells,
    binary_lines,
    binary_metrics,
    card_lines,
    confusion_cells,
    confusion_metrics,
)
from worker.trainer.tasks.examples import Examples, Indices, lengths_of
from worker.trainer.tasks.interface import Batch, TextTask, classes_in, on_device, text_inputs


class TextClassification(TextTask):
    """The task, bound to one job's tokenizer and classes."""

    pipeline_tag: ClassVar[str] = "text-classification"

    @property
    def multi_label(self) -> bool:
        """Whether a row has any number of the classes."""
        return bool(self.spec.options.get("multi_label"))

    def usage(self, options: str = "") -> str:
        """By a pipeline: of several labels it tells the score of each."""
        every = ", top_k=None" if self.multi_label else ""
        return super().usage(f", truncation=True{every}{options}")

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> Examples:
        """Roles `text`, `text_pair`, `label`: a class, or a JSON list of classes."""
        inputs, lost = self.encode_texts(columns)
        index = self.spec.class_index
        try:
            if self.multi_label:
                labels = torch.zeros(len(columns["label"]), len(self.labels))
                for row, cell in enumerate(columns["label"]):
                    labels[row, [index[name] for name in classes_in(cell)]] = 1.0
            else:
                labels = torch.tensor([index[name] for name in columns["label"]], dtype=torch.int64)
        except (KeyError, TypeError, ValueError):
            raise TrainerFailure("data_mismatch", "a label is not a declared class") from None
        return Examples(inputs, {"labels": labels}, lengths_of(inputs["input_ids"]), lost)

    def synthetic(self, model: PreTrainedModel, rows: int) -> Examples:
        """Random ids, classes in turn."""
        inputs = self.synthetic_inputs(model, rows)
        labels = torch.arange(rows) % len(self.labels)
        if self.multi_label:
            labels = nn.functional.one_hot(labels, len(self.labels)).to(torch.float32)
        return Examples(inputs, {"labels": labels}, lengths_of(inputs["input_ids"]))

    def batch(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """input_ids, attention_mask, token_type_ids (rows, length); labels (rows,), or (rows, classes)."""
        return on_device(self.padded_inputs(examples, rows), device) | self.targets(examples, rows, device)

    def targets(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """labels."""
        return on_device({"labels": examples.tensors["labels"][torch.as_tensor(np.asarray(rows))]}, device)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, classes)."""
        logits: Tensor = model(**text_inputs(batch)).logits
        return logits.float()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy; of several labels, the mean over classes of the binary one."""
        if self.multi_label:
            return nn.functional.binary_cross_entropy_with_logits(outputs, batch["labels"], reduction="none").mean(1)
        return nn.functional.cross_entropy(outputs, batch["labels"], reduction="none")

    def statistics(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The row's one cell of the confusion matrix, (rows, classes²), or one of four for each class."""
        if self.multi_label:
            return binary_cells(batch["labels"] > 0.5, outputs > 0.0)
        return confusion_cells(batch["labels"], outputs.argmax(1), len(self.labels))

    def metrics(self, totals: Tensor, num_units: int, noise_std: float = 0.0) -> dict[str, Any]:
        """Accuracy, precision, recall, F1."""
        classes = len(self.labels)
        if self.multi_label:
            return binary_metrics(totals.view(classes, 4), num_units, noise_std)
        return confusion_metrics(totals.view(classes, classes), num_units, noise_std)

    def card(self, metrics: Mapping[str, Any]) -> list[str]:
        """Accuracy with its interval, averages."""
        return binary_lines(metrics) if self.multi_label else card_lines(metrics)
