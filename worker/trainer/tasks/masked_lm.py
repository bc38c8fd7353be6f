"""Masked language modeling (Devlin et al. 2019): self-supervised adaptation to a domain, without labels.

Each step hides other tokens of a row (Liu et al. 2019), by a secret key of its own; an evaluation always the same.
Which they are follows besides from the row's own tokens alone. Not from its place in the file: a person's rows that are
replaced by nothing move every later row up, and would change what all other people's rows give. Hiding comes before a
unit's gradient is clipped, so that it costs nothing, whoever knew what was hidden. A replayed step hides the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.trainer.tasks.examples import Examples, Indices, lengths_of
from worker.trainer.tasks.interface import IGNORED, Batch, TextTask, mean_over_tokens, on_device, text_inputs
from worker.trainer.tasks.language_modeling import loss_and_accuracy, loss_lines, loss_metrics, token_losses

#: Of a row's tokens so many are predicted; of those the shares that become the mask, and another token.
_HIDDEN, _MASKED, _REPLACED = 0.15, 0.8, 0.1


class MaskedLanguageModeling(TextTask):
    """The task, bound to one job's tokenizer."""

    pipeline_tag: ClassVar[str] = "fill-mask"
    asked: ClassVar[str] = 'f"A text with {run.tokenizer.mask_token} in it."'

    def usage(self, options: str = "") -> str:
        """By a pipeline, which cuts nothing unless it is told to."""
        return super().usage(', tokenizer_kwargs={"truncation": True}' + options)

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> Examples:
        """Role `text`."""
        encoded, lost = self.encode_texts({"text": columns["text"]})
        pairs = [self._hide_words(ids) for ids in encoded["input_ids"]]
        inputs = [hidden for hidden, _ in pairs]
        return Examples(
            {"input_ids": inputs, "labels": [targets for _, targets in pairs]}, {}, lengths_of(inputs), lost
        )

    def at_step(self, examples: Examples, rows: Indices, key: bytes) -> Examples:
        """With other tokens of these rows hidden."""
        inputs, labels = (list(examples.sequences[name]) for name in ("input_ids", "labels"))
        for row in rows:
            ids = np.where(labels[row] == IGNORED, inputs[row], labels[row])
            inputs[row], labels[row] = self._hide_words(ids, key)
        return dataclasses.replace(examples, sequences={"input_ids": inputs, "labels": labels})

    def _hide_words(
        self, ids: npt.NDArray[np.int64], key: bytes = b""
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        candidates = np.flatnonzero(~np.isin(ids, self.processor.all_special_ids))
        return self._hide(ids, candidates, len(self.processor), key)

    def _hide(
        self, ids: npt.NDArray[np.int64], candidates: npt.NDArray[np.int64], vocabulary: int, key: bytes = b""
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The row with hidden tokens, and its targets, IGNORED elsewhere. At least one token is predicted, if any."""
        own = hashlib.sha256(key + ids.astype("<i8").tobytes()).digest()
        random = np.random.default_rng(np.frombuffer(own, dtype="<u4"))
        count = min(len(candidates), max(1, round(_HIDDEN * len(candidates))))
        chosen = random.permutation(candidates)[:count]
        hidden, targets = ids.copy(), np.full_like(ids, IGNORED)
        targets[chosen] = ids[chosen]
        fate = random.random(count)
        hidden[chosen[fate < _MASKED]] = self.processor.mask_token_id
        replaced = chosen[fate >= 1.0 - _REPLACED]
        hidden[replaced] = random.integers(vocabulary, size=len(replaced))
        return hidden, targets

    def synthetic(self, model: PreTrainedModel, rows: int) -> Examples:
        """Random ids."""
        ids = self.synthetic_inputs(model, rows)["input_ids"]
        pairs = [self._hide(row, np.arange(len(row)), int(model.config.vocab_size)) for row in ids]
        inputs = [hidden for hidden, _ in pairs]
        return Examples({"input_ids": inputs, "labels": [targets for _, targets in pairs]}, {}, lengths_of(inputs))

    def batch(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels (rows, length); labels are IGNORED where nothing is predicted."""
        return on_device(self.padded_inputs(examples, rows), device) | self.targets(examples, rows, device)

    def targets(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """labels (rows, length)."""
        labels, _ = examples.padded("labels", rows, IGNORED)
        return on_device({"labels": labels}, device)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, length, vocabulary)."""
        logits: Tensor = model(**text_inputs(batch)).logits
        return logits.float()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy, mean over the record's hidden tokens."""
        return mean_over_tokens(*token_losses(outputs, batch["labels"]))

    def statistics(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(rows, 2): the record's loss, scaled, and its share of tokens that were the likeliest."""
        return loss_and_accuracy(outputs, batch["labels"])

    def metrics(self, totals: Tensor, num_units: int, noise_std: float = 0.0) -> dict[str, Any]:
        """Loss, perplexity, token accuracy, of hidden tokens."""
        return loss_metrics(totals, num_units, noise_std)

    def card(self, metrics: Mapping[str, Any]) -> list[str]:
        """Loss and accuracy with their intervals."""
        return loss_lines(metrics)
