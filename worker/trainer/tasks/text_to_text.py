"""Text to text: an encoder reads the source, a decoder learns the target; one mean loss a record over target tokens.

Both texts are cut at their ends, the target's end token stays. Translation and summarization are the same task with
other columns. BLEU, chrF and ROUGE cannot be bounded a record: they are computed on data declared public only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from app.catalog import languages
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks import generated_text
from worker.trainer.tasks.examples import Examples, Indices, lengths_of
from worker.trainer.tasks.interface import (
    IGNORED,
    Batch,
    TextTask,
    mean_over_tokens,
    on_device,
    require_texts,
    text_inputs,
)
from worker.trainer.tasks.language_modeling import loss_and_accuracy, loss_lines, loss_metrics, token_losses

_CHUNK = 4096


class TextToText(TextTask):
    """The task, bound to one job's tokenizer, prefix and lengths."""

    pipeline_tag: ClassVar[str] = "text2text-generation"

    def __init__(self, spec: TaskSpec, base: Path, max_length: int) -> None:
        super().__init__(spec, base, max_length)
        self.prefix = str(spec.options.get("source_prefix") or "")
        self.languages_of = str(spec.options.get("languages_of") or "")
        self.max_target_length = min(int(spec.options.get("max_target_length") or spec.max_length), max_length)
        self._references: list[str] = []

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> Examples:
        """Roles `source`, `target`, and both languages where rows have their own.

        The tensor `row` says which of the references is a row's own."""
        sources, targets = require_texts(columns["source"]), require_texts(columns["target"])
        first = len(self._references)
        self._references += targets
        texts = [before + source for before, source in zip(self._prefixes(columns), sources, strict=True)]
        inputs = self._encoded("text", texts, self.max_length)
        labels = self._encoded("text_target", targets, self.max_target_length)
        examples = self._examples(inputs, labels, torch.arange(first, first + len(targets)))
        lost = {
            "source": self.tokens_lost(inputs, self.max_length, {"text": texts}),
            "target": self.tokens_lost(labels, self.max_target_length, {"text_target": targets}),
        }
        return dataclasses.replace(examples, lost=lost)

    def synthetic(self, model: PreTrainedModel, rows: int) -> Examples:
        """Random ids."""
        ids = self.synthetic_inputs(model, rows)["input_ids"]
        return self._examples(ids, [row[: max(2, len(row) // 2)] for row in ids][::-1], torch.full((rows,), -1))

    def batch(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """input_ids, attention_mask (rows, length); labels (rows, target length), IGNORED behind the end."""
        return on_device(self.padded_inputs(examples, rows), device) | self.targets(examples, rows, device)

    def targets(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """labels (rows, target length)."""
        labels, _ = examples.padded("labels", rows, IGNORED)
        return on_device({"labels": labels}, device)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, target length, vocabulary): the decoder reads the labels moved by one, as the model itself does it."""
        seq2seq: Any = model
        shifted = seq2seq.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        logits: Tensor = model(**text_inputs(batch), decoder_input_ids=shifted, use_cache=False).logits
        return logits.float()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy, mean over the record's target tokens."""
        losses, mask = token_losses(outputs, batch["labels"])
        return mean_over_tokens(losses, mask)

    def statistics(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(rows, 2), as of language modeling."""
        return loss_and_accuracy(outputs, batch["labels"])

    def metrics(self, totals: Tensor, num_units: int, noise_std: float = 0.0) -> dict[str, Any]:
        """Loss, perplexity, token accuracy."""
        return loss_metrics(totals, num_units, noise_std)

    def public_metrics(self, model: PreTrainedModel, examples: Examples) -> dict[str, Any]:
        """BLEU, chrF and ROUGE of the first rows."""
        rows = range(min(len(examples), generated_text.MAX_ROWS))
        written = self._write(model, examples, rows)
        references = [self._references[int(examples.tensors["row"][row])] for row in rows]
        return {**generated_text.scores(written, references), "generated_rows": len(rows)}

    def card(self, metrics: Mapping[str, Any]) -> list[str]:
        """Loss and accuracy, and what was generated."""
        return [*loss_lines(metrics), *generated_text.lines(metrics)]

    def notes(self) -> list[str]:
        """Where texts are cut, and what a source begins with."""
        says = self.prefix or (self.languages_of and languages.prefix(self.languages_of, "en", "fr"))
        such = "such words as " if self.languages_of else ""
        begins = [f"Every source must begin with {such}{says!r}, as in training."] if says else []
        return [
            f"Sources are cut to {self.max_length} tokens, targets were cut to {self.max_target_length}.",
            *begins,
        ]

    def _prefixes(self, columns: Mapping[str, Sequence[Any]]) -> list[str]:
        """Of each row."""
        if not self.languages_of:
            return [self.prefix] * len(columns["source"])
        pairs = zip(require_texts(columns["source_lang"]), require_texts(columns["target_lang"]), strict=True)
        return [languages.prefix(self.languages_of, *pair) for pair in pairs]

    @torch.inference_mode()
    def _write(self, model: Any, examples: Examples, rows: Indices) -> list[str]:
        """Greedily, a few rows at a time."""
        longest = min(self.max_target_length, generated_text.MAX_TOKENS)
        written: list[str] = []
        for start in range(0, len(rows), generated_text.ROWS_AT_ONCE):
            chosen = rows[start : start + generated_text.ROWS_AT_ONCE]
            inputs = text_inputs(self.batch(examples, chosen, model.device))
            answers = model.generate(**inputs, generation_config=_greedy(model, longest))
            written += self.processor.batch_decode(answers, skip_special_tokens=True)
        return written

    def _encoded(self, side: str, texts: list[str], longest: int) -> list[np.ndarray]:
        encoded: list[np.ndarray] = []
        for start in range(0, len(texts), _CHUNK):
            piece = {side: texts[start : start + _CHUNK]}
            rows = self.processor(**piece, truncation=True, max_length=longest)["input_ids"]
            encoded += [np.asarray(row or [self.padding], dtype=np.int64) for row in rows]
        return encoded

    def _examples(self, inputs: list[np.ndarray], labels: list[np.ndarray], row: Tensor) -> Examples:
        return Examples({"input_ids": inputs, "labels": labels}, {"row": row}, lengths_of(inputs) + lengths_of(labels))


class Translation(TextToText):
    """From one language into another; which, the base or the prefix says."""

    pipeline_tag: ClassVar[str] = "translation"


class Summarization(TextToText):
    """A document and its summary."""

    pipeline_tag: ClassVar[str] = "summarization"


def _greedy(model: PreTrainedModel, longest: int) -> GenerationConfig:
    """The model's own special tokens, and none of its search."""
    own = model.generation_config
    assert own is not None
    configuration: Any = GenerationConfig
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
    tokens = {name: getattr(own, name, None) for name in names}
    made: GenerationConfig = configuration(**tokens, max_new_tokens=longest, do_sample=False, num_beams=1)
    return made
