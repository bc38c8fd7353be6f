"""Causal language modeling on plain text: each token from those before it, one mean loss a record.

No text is packed with another: a row is one record, so that no two privacy units meet in one sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.trainer.tasks.examples import Examples, Indices, lengths_of
from worker.trainer.tasks.interface import IGNORED, Batch, TextTask, mean_over_tokens, on_device, require_texts
from worker.trainer.tasks.noise import readable, share_interval

#: A record's mean loss is cut off here before it is released, in nats: about that of a guess among 22,000 tokens.
MAX_LOSS = 10.0

#: A loss is not told where the noise's 95 % half-width on it is so many nats: its perplexity would be known to a factor
#: of e up and down.
_MOST_NOISE = 1.0


class LanguageModeling(TextTask):
    """The task, bound to one job's tokenizer."""

    pipeline_tag: ClassVar[str] = "text-generation"
    asked: ClassVar[str] = '"A text that goes on", max_new_tokens=100'

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> Examples:
        """Role `text`; a text ends with the end-of-text token where the tokenizer has one and it fits."""
        end = self.processor.eos_token_id
        texts = require_texts(columns["text"])
        ids = []
        for text in texts:
            tokens = self.processor(text, truncation=True, max_length=self.max_length)["input_ids"]
            if end is not None and len(tokens) < self.max_length and tokens[-1:] != [end]:
                tokens = [*tokens, end]
            ids.append(np.asarray(tokens or [self.padding], dtype=np.int64))
        lost = self.tokens_lost(ids, self.max_length, {"text": texts})
        return Examples({"input_ids": ids, "labels": ids}, {}, lengths_of(ids), {"text": lost})

    def synthetic(self, model: PreTrainedModel, rows: int) -> Examples:
        """Random ids."""
        ids = self.synthetic_inputs(model, rows)["input_ids"]
        return Examples({"input_ids": ids, "labels": ids}, {}, lengths_of(ids))

    def batch(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels (rows, length); labels are IGNORED where nothing is predicted."""
        return on_device(self.padded_inputs(examples, rows), device) | self.targets(examples, rows, device)

    def targets(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """labels (rows, length)."""
        labels, _ = examples.padded("labels", rows, IGNORED)
        return on_device({"labels": labels}, device)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, length, vocabulary)."""
        logits: Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        return logits.float()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of the next token, mean over the record's predicted tokens."""
        losses, mask = token_losses(outputs[:, :-1], batch["labels"][:, 1:])
        return mean_over_tokens(losses, mask)

    def statistics(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(rows, 2): the record's loss over MAX_LOSS, and its share of tokens that were the likeliest."""
        return loss_and_accuracy(outputs[:, :-1], batch["labels"][:, 1:])

    def metrics(self, totals: Tensor, num_units: int, noise_std: float = 0.0) -> dict[str, Any]:
        """Loss, perplexity, token accuracy."""
        return loss_metrics(totals, num_units, noise_std)

    def card(self, metrics: Mapping[str, Any]) -> list[str]:
        """Loss and accuracy with their intervals."""
        return loss_lines(metrics)


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logits: (rows, length, vocabulary), labels: (rows, length) → cross-entropies and the mask of what counts, both
    (rows, length)."""
    mask = labels != IGNORED
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2), labels.masked_fill(~mask, 0), reduction="none"
    ).masked_fill(~mask, 0.0)
    return losses, mask


def loss_and_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows, 2) float64, each in [0, 1]: the mean loss over MAX_LOSS, the share of right tokens."""
    losses, mask = token_losses(logits, labels)
    mean = mean_over_tokens(losses, mask).nan_to_num(nan=MAX_LOSS).clamp(0.0, MAX_LOSS) / MAX_LOSS
    right = mean_over_tokens((logits.argmax(-1) == labels).to(losses.dtype), mask)
    return torch.stack([mean, right], 1).to(device="cpu", dtype=torch.float64)


def loss_metrics(totals: Tensor, num_units: int, noise_std: float = 0.0) -> dict[str, Any]:
    """totals: (2,), sums over units of `loss_and_accuracy`. Intervals cover noise and the finite number of units; what
    the noise hides is left out, by name."""
    shares = [min(1.0, max(0.0, value / num_units)) for value in totals.tolist()]
    # The variance of values in [0, 1] of this mean is at most that of zeros and ones.
    low, high = (MAX_LOSS * bound for bound in share_interval(shares[0], num_units, noise_std))
    loss = MAX_LOSS * shares[0]
    found: dict[str, Any] = {}
    withheld: dict[str, str] = {}
    if readable(num_units, noise_std, _MOST_NOISE / MAX_LOSS):
        found |= {
            "loss": loss,
            "loss_interval_95": [low, high],
            "loss_cut_off_at": MAX_LOSS,
            "perplexity": math.exp(loss),
            "perplexity_interval_95": [math.exp(low), math.exp(high)],
        }
    else:
        withheld |= {"loss": "noise", "perplexity": "noise"}
    if readable(num_units, noise_std):
        interval = share_interval(shares[1], num_units, noise_std)
        found |= {"token_accuracy": shares[1], "token_accuracy_interval_95": interval}
    else:
        withheld |= {"token_accuracy": "noise"}
    return {**found, **({"not_released": withheld} if withheld else {})}


def loss_lines(metrics: Mapping[str, Any]) -> list[str]:
    """For the model card."""
    lines = []
    if "loss" in metrics:
        low, high = metrics["loss_interval_95"]
        lines.append(
            f"- loss {metrics['loss']:.4f} nats a token (95 % interval {low:.4f} to {high:.4f}), "
            f"perplexity {metrics['perplexity']:.4g}; a record's loss counts up to {metrics['loss_cut_off_at']:g}"
        )
    if "token_accuracy" in metrics:
        lines.append(f"- token accuracy {metrics['token_accuracy']:.4f}")
    return lines
