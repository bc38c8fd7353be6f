"""Text classification: one text, one of a declared list of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.trainer.failure import TrainerFailure
from worker.trainer.tasks.confusion import card_lines, confusion_cells, confusion_metrics
from worker.trainer.tasks.examples import Examples, Indices, lengths_of
from worker.trainer.tasks.interface import Batch, TextTask, on_device, require_texts

#: Texts handed to the tokenizer at once.
_CHUNK = 4096


class TextClassification(TextTask):
    """The task, bound to one job's tokenizer and classes."""

    pipeline_tag: ClassVar[str] = "text-classification"

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> Examples:
        """Roles `text`, `label`."""
        texts, names = require_texts(columns["text"]), columns["label"]
        index = {name: position for position, name in enumerate(self.labels)}
        if not all(name in index for name in names):
            raise TrainerFailure("data_mismatch", "a label is not a declared class")
        ids: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(texts), _CHUNK):
            encoded = self.processor(texts[start : start + _CHUNK], truncation=True, max_length=self.max_length)
            ids.extend(np.asarray(row, dtype=np.int64) for row in encoded["input_ids"])
        labels = torch.tensor([index[str(name)] for name in names], dtype=torch.int64)
        return Examples({"input_ids": ids}, {"labels": labels}, lengths_of(ids))

    def synthetic(self, model: PreTrainedModel, rows: int) -> Examples:
        """Random ids."""
        ids = synthetic_ids(model, rows, self.max_length)
        return Examples({"input_ids": ids}, {"labels": torch.arange(rows) % len(self.labels)}, lengths_of(ids))

    def batch(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """input_ids, attention_mask (rows, length); labels (rows,)."""
        return on_device(self.padded_inputs(examples, rows), device) | self.targets(examples, rows, device)

    def targets(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """labels (rows,)."""
        return on_device({"labels": examples.tensors["labels"][torch.as_tensor(np.asarray(rows))]}, device)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, classes)."""
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits.float()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(outputs, batch["labels"], reduction="none")

    def statistics(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The row's one cell of the confusion matrix, (rows, classes²)."""
        return confusion_cells(batch["labels"], outputs.argmax(1), len(self.labels))

    def metrics(self, totals: Tensor, num_units: int, noise_std: float = 0.0) -> dict[str, Any]:
        """Accuracy, precision, recall, F1."""
        classes = len(self.labels)
        return confusion_metrics(totals.view(classes, classes), num_units, noise_std)

    def card(self, metrics: Mapping[str, Any]) -> list[str]:
        """Accuracy with its interval, macro averages."""
        return card_lines(metrics)


def synthetic_ids(model: PreTrainedModel, rows: int, max_length: int) -> list[npt.NDArray[np.int64]]:
    """Random token ids in rows of different lengths, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)
    longest = max(2, min(max_length, 24))
    return [torch.randint(vocabulary, (2 + row % (longest - 1),), generator=generator).numpy() for row in range(rows)]
