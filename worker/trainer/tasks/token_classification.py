"""Token classification: a list of tokens, and a tag for each, from a declared list.

A token that the tokenizer cuts into pieces is predicted at its first piece; tokens beyond the longest input are left
out, and so not counted. Released privately are shares of tokens; whole entities are counted on public data only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.catalog.tasks import TASKS
from worker.trainer.failure import TrainerFailure
from worker.trainer.tasks import entities
from worker.trainer.tasks.confusion import card_lines, confusion_metrics
from worker.trainer.tasks.examples import Examples, Indices, lengths_of
from worker.trainer.tasks.interface import (
    IGNORED,
    Batch,
    TextTask,
    classes_in,
    mean_over_tokens,
    on_device,
    text_inputs,
)

#: Of one forward pass for the entities.
_ROWS_AT_ONCE = 32


class TokenClassification(TextTask):
    """The task, bound to one job's tokenizer and tags."""

    pipeline_tag: ClassVar[str] = "token-classification"

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> Examples:
        """Roles `tokens`, `tags`: JSON lists of strings, and of classes, of equal lengths in a row."""
        index = self.spec.class_index
        texts: list[list[str]] = []
        ids: list[npt.NDArray[np.int64]] = []
        labels: list[npt.NDArray[np.int64]] = []
        for tokens_cell, tags_cell in zip(columns["tokens"], columns["tags"], strict=True):
            try:
                tokens, tags = json.loads(tokens_cell), [index[tag] for tag in classes_in(tags_cell)]
                if len(tokens) != len(tags) or not all(isinstance(token, str) for token in tokens):
                    raise ValueError
            except (KeyError, TypeError, ValueError):
                raise TrainerFailure("data_mismatch", "tokens and tags do not fit each other") from None
            texts.append(tokens)
            encoded = self.processor(tokens, is_split_into_words=True, truncation=True, max_length=self.max_length)
            words = encoded.word_ids()
            first = [word is not None and (place == 0 or words[place - 1] != word) for place, word in enumerate(words)]
            ids.append(np.asarray(encoded["input_ids"], dtype=np.int64))
            labels.append(
                np.asarray(
                    [tags[word] if begins else IGNORED for word, begins in zip(words, first, strict=True)],
                    dtype=np.int64,
                )
            )
        lost = self.tokens_lost(ids, self.max_length, {"text": texts}, is_split_into_words=True)
        return Examples({"input_ids": ids, "labels": labels}, {}, lengths_of(ids), {"tokens": lost})

    def synthetic(self, model: PreTrainedModel, rows: int) -> Examples:
        """Random ids, tags in turn, the first token without one."""
        ids = self.synthetic_inputs(model, rows)["input_ids"]
        labels = [np.where(np.arange(len(row)) == 0, IGNORED, np.arange(len(row)) % len(self.labels)) for row in ids]
        return Examples({"input_ids": ids, "labels": labels}, {}, lengths_of(ids))

    def batch(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels (rows, length); labels are IGNORED where nothing is predicted."""
        return on_device(self.padded_inputs(examples, rows), device) | self.targets(examples, rows, device)

    def targets(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """labels (rows, length)."""
        labels, _ = examples.padded("labels", rows, IGNORED)
        return on_device({"labels": labels}, device)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, length, tags)."""
        logits: Tensor = model(**text_inputs(batch)).logits
        return logits.float()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy, mean over the record's tagged tokens."""
        mask = batch["labels"] != IGNORED
        labels = batch["labels"].masked_fill(~mask, 0)
        return mean_over_tokens(nn.functional.cross_entropy(outputs.transpose(1, 2), labels, reduction="none"), mask)

    def statistics(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(rows, tags²): the shares of the record's tokens in each cell of the confusion matrix; they add up to 1.

        Shares, and not counts cut to a norm: a record's vector has norm 1 at most without being cut, whatever its
        length, and the accuracy that follows is a mean over a public number of units.
        """
        mask = batch["labels"] != IGNORED
        tags = len(self.labels)
        cells = (batch["labels"].masked_fill(~mask, 0) * tags + outputs.argmax(-1)).cpu()
        weights = mask.cpu().to(torch.float64)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1.0)
        return torch.zeros(len(cells), tags * tags, dtype=torch.float64).scatter_add_(1, cells, weights)

    def metrics(self, totals: Tensor, num_units: int, noise_std: float = 0.0) -> dict[str, Any]:
        """Accuracy, precision, recall, F1 over tokens, each record counting once."""
        tags = len(self.labels)
        return confusion_metrics(totals.view(tags, tags), num_units, noise_std)

    def card(self, metrics: Mapping[str, Any]) -> list[str]:
        """Of tokens."""
        means = "Over tokens, each record counting once by the mean over its own:"
        return [means, "", *card_lines(metrics), *entities.lines(metrics)]

    @torch.inference_mode()
    def public_metrics(self, model: PreTrainedModel, examples: Examples) -> dict[str, Any]:
        """Whole entities, of tags that say where these begin; `not_released` names them where tags do not."""
        if not entities.of_a_scheme(self.labels):
            return {"not_released": dict.fromkeys(TASKS[self.spec.type].public_metrics, "no_entities")}
        true: list[list[str]] = []
        told: list[list[str]] = []
        for start in range(0, len(examples), _ROWS_AT_ONCE):
            chosen = range(start, min(start + _ROWS_AT_ONCE, len(examples)))
            batch = self.batch(examples, chosen, model.device)
            predicted = self.outputs(model, batch).argmax(-1).cpu()
            for labels, tags in zip(batch["labels"].cpu(), predicted, strict=True):
                kept = labels != IGNORED
                true.append([self.labels[tag] for tag in labels[kept].tolist()])
                told.append([self.labels[tag] for tag in tags[kept].tolist()])
        return entities.scores(true, told)
