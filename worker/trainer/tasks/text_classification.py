"""Text classification: one text, one of a declared list of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from worker.trainer.failure import TrainerFailure
from worker.trainer.spec import TaskSpec

#: Texts handed to the tokenizer at once.
_CHUNK = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Encoded rows: token ids without padding, and class indices (rows,)."""

    input_ids: Sequence[npt.NDArray[np.int64]]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.fromiter((len(ids) for ids in self.input_ids), dtype=np.int64, count=len(self.input_ids))


class TextClassification:
    """The task, bound to one job's tokenizer and classes."""

    def __init__(self, spec: TaskSpec, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.labels = spec.labels
        self._tokenizer = tokenizer
        self._max_length = min(spec.max_length, max_length)

    def encode(self, columns: dict[str, list[object]]) -> Examples:
        """Rows by role (`text`, `label`) to examples; TrainerFailure `data_mismatch` on anything but known strings."""
        texts, names = columns["text"], columns["label"]
        index = {name: position for position, name in enumerate(self.labels)}
        if not all(isinstance(text, str) for text in texts) or not all(name in index for name in names):
            raise TrainerFailure("data_mismatch", "a text is missing or a label is not a declared class")
        ids: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(texts), _CHUNK):
            encoded = self._tokenizer(texts[start : start + _CHUNK], truncation=True, max_length=self._max_length)
            ids.extend(np.asarray(row, dtype=np.int64) for row in encoded["input_ids"])
        return Examples(ids, torch.tensor([index[str(name)] for name in names], dtype=torch.int64))

    def synthetic(self, model: PreTrainedModel, rows: int) -> Examples:
        """Public rows of different lengths for dry runs and checks: the same on every call."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(model.config.vocab_size)
        longest = max(2, min(self._max_length, 24))
        ids = [
            torch.randint(vocabulary, (2 + row % (longest - 1),), generator=generator).numpy() for row in range(rows)
        ]
        return Examples(ids, torch.arange(rows) % len(self.labels))

    def batch(
        self, examples: Examples, rows: Sequence[int] | npt.NDArray[np.int64], device: torch.device
    ) -> dict[str, Tensor]:
        """The rows as tensors, padded to the longest: input_ids, attention_mask (rows, length); labels (rows,)."""
        ids = [torch.from_numpy(examples.input_ids[row]) for row in rows]
        padding = int(self._tokenizer.pad_token_id or 0)
        input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding)
        lengths = torch.tensor([len(row) for row in ids])
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).to(torch.int64)
        labels = examples.labels[torch.as_tensor(np.asarray(rows))]
        batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        return {name: value.to(device, non_blocking=True) for name, value in batch.items()}

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(rows, classes), float32."""
        output: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return output.float()

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """One cross-entropy for each row, (rows,)."""
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
