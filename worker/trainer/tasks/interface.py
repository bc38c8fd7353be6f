"""What a task type is to the trainer: rows in, batches, a loss and bounded statistics per record, metrics from sums."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from worker.trainer.failure import TrainerFailure
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.examples import Examples, Indices

Batch = Mapping[str, Tensor]

#: Targets that no loss reads, transformers' own value.
IGNORED = -100

#: Texts handed to the tokenizer at once.
_CHUNK = 4096

#: For the bundle's folder, in the model card's lines of Python.
FOLDER = "PATH_OF_THIS_FOLDER"
_PAIR = '{"text": "A text of yours.", "text_pair": "The other one."}'


class TrainerTask(Protocol):
    """A task, bound to one job's base, columns and classes. Constructed as cls(spec, base folder, max_length).

    A task can hand in no batch mean: its loss is one value per record. What it measures leaves as one noised sum over
    units of `statistics`, whose norm the plan bounds; metrics are made of that sum alone.

    pipeline_tag: of the model card, a task as the hub names it.
    """

    pipeline_tag: ClassVar[str]
    spec: TaskSpec
    processor: Any

    def prepare(self, model: PreTrainedModel) -> None:
        """Writes into the loaded model's configuration of generating what the job says of it; nothing, for most.
        TrainerFailure `base_model_invalid` where the model cannot read what the task makes of rows."""
        ...

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> Examples:
        """Rows by role to examples. TrainerFailure `data_mismatch` on cells that are not of the task's kind."""
        ...

    def synthetic(self, model: PreTrainedModel, rows: int) -> Examples:
        """Public rows of different lengths for dry runs and checks: the same on every call."""
        ...

    def batch(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """Inputs and targets of the rows as tensors, padded to the longest."""
        ...

    def at_step(self, examples: Examples, rows: Indices, key: bytes) -> Examples:
        """The examples as one step of training reads these rows: for most tasks as they are. key: of that step alone,
        and secret. What a row becomes depends on both alone, and is as long."""
        ...

    def targets(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """Only what `loss` reads of a batch; for heads on features that were computed before."""
        ...

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's logits, (rows, …), float32."""
        ...

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """One loss for each record, (rows,): a mean within the record, never over the batch."""
        ...

    def statistics(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(rows, k) float64: what an evaluation sums over units; private. Rows beyond the plan's sensitivity in L2 are
        scaled down to it by the caller."""
        ...

    def metrics(self, totals: Tensor, num_units: int, noise_std: float = 0.0) -> dict[str, Any]:
        """What is released, from `statistics` summed over units' means, (k,), with noise of that standard deviation
        on each entry. Undefined ratios are 0; values are kept in their range. `not_released` names, with `noise`, what
        the noise makes meaningless."""
        ...

    def card(self, metrics: Mapping[str, Any]) -> list[str]:
        """The released metrics as lines of the model card."""
        ...

    def finish(self, head: nn.Module) -> None:
        """Rewrites a trained pooled head so that the exported model answers in the task's own units."""
        ...

    def public_metrics(self, model: PreTrainedModel, examples: Examples) -> dict[str, Any]:
        """Exact metrics of what the model generates for some of these rows, which are declared public; {} for most."""
        ...

    def notes(self) -> list[str]:
        """What the model's users must know about its inputs, as sentences of the model card."""
        ...

    def usage(self, options: str = "") -> str:
        """Lines of Python of the model card, which define `run`, and call it. options: that loading needs,
        `, name=value`."""
        ...


def by_pipeline(tag: str, options: str, asked: str) -> str:
    """`TrainerTask.usage` by one of transformers' pipelines. asked: what it is called with."""
    made = f'run = pipeline("{tag}", model="{FOLDER}"{options})'
    return f"from transformers import pipeline\n\n{made}\nprint(run({asked}))"


class TextTask:
    """What tasks on text share: the tokenizer, and batches of padded token ids."""

    pipeline_tag: ClassVar[str]
    asked: ClassVar[str] = '"A text of yours."'
    """What the model card calls it with, in Python."""

    def __init__(self, spec: TaskSpec, base: Path, max_length: int) -> None:
        self.spec = spec
        self.labels = spec.labels
        self.max_length = min(spec.max_length, max_length)
        self.processor = load_tokenizer(base)

    def prepare(self, model: PreTrainedModel) -> None:
        """TrainerFailure `base_model_invalid` where the tokenizer has a token without an embedding: what the service
        cannot see of it in its files."""
        rows: Any = model.get_input_embeddings()
        if max(self.processor.get_vocab().values(), default=0) >= rows.num_embeddings:
            raise TrainerFailure("base_model_invalid", "the tokenizer has more tokens than the weights")

    def finish(self, head: nn.Module) -> None:
        """Nothing, for most tasks."""

    def public_metrics(self, model: PreTrainedModel, examples: Examples) -> dict[str, Any]:
        """None, for most tasks."""
        return {}

    def at_step(self, examples: Examples, rows: Indices, key: bytes) -> Examples:
        """As they are."""
        return examples

    def notes(self) -> list[str]:
        """Where inputs are cut."""
        return [f"Inputs are cut to {self.max_length} tokens."]

    def usage(self, options: str = "") -> str:
        """By a pipeline."""
        pair = "text_pair" in self.spec.columns
        return by_pipeline(self.pipeline_tag, options, _PAIR if pair else self.asked)

    @property
    def padding(self) -> int:
        """The id that fills up shorter rows; masked, so that any will do."""
        return int(self.processor.pad_token_id or 0)

    def padded_inputs(self, examples: Examples, rows: Indices) -> dict[str, Tensor]:
        """input_ids, attention_mask, and token_type_ids of pairs, (rows, longest)."""
        input_ids, mask = examples.padded("input_ids", rows, self.padding)
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if "token_type_ids" in examples.sequences:
            inputs["token_type_ids"], _ = examples.padded("token_type_ids", rows, 0)
        return inputs

    def encode_texts(
        self, columns: Mapping[str, Sequence[Any]]
    ) -> tuple[dict[str, list[npt.NDArray[np.int64]]], dict[str, npt.NDArray[np.int64]]]:
        """Roles `text` and, where the task reads pairs, `text_pair` → input_ids, and token_type_ids of pairs; and
        `Examples.lost`. The longer text of a pair is cut first."""
        texts = require_texts(columns["text"])
        pairs = require_texts(columns["text_pair"]) if "text_pair" in columns else None
        encoded: dict[str, list[npt.NDArray[np.int64]]] = {}
        for start in range(0, len(texts), _CHUNK):
            piece = slice(start, start + _CHUNK)
            answer = self.processor(
                texts[piece], None if pairs is None else pairs[piece], truncation=True, max_length=self.max_length
            )
            for name in ("input_ids",) if pairs is None else ("input_ids", "token_type_ids"):
                if name in answer:
                    encoded.setdefault(name, []).extend(np.asarray(row, dtype=np.int64) for row in answer[name])
        both = {"text": texts} if pairs is None else {"text": texts, "text_pair": pairs}
        return encoded, {"text": self.tokens_lost(encoded["input_ids"], self.max_length, both)}

    def tokens_lost(
        self,
        kept: Sequence[Sequence[int] | npt.NDArray[np.int64]],
        longest: int,
        inputs: Mapping[str, Sequence[Any]],
        **how: Any,
    ) -> npt.NDArray[np.int64]:
        """(rows,): tokens that each row has beyond `longest`. kept: the rows as they were cut, of which only those of
        that length can have lost any. inputs: of the tokenizer, all rows; how: what else it was told."""
        lost = np.zeros(len(kept), dtype=np.int64)
        at_limit = [row for row, ids in enumerate(kept) if len(ids) >= longest]
        for start in range(0, len(at_limit), _CHUNK):
            rows = at_limit[start : start + _CHUNK]
            chosen: Any = {name: [cells[row] for row in rows] for name, cells in inputs.items()}
            whole = self.processor(**chosen, **how, truncation=False, verbose=False)["input_ids"]
            lost[rows] = [max(0, len(ids) - longest) for ids in whole]
        return lost

    def synthetic_inputs(self, model: PreTrainedModel, rows: int) -> dict[str, list[npt.NDArray[np.int64]]]:
        """Random token ids in rows of different lengths, the same on every call, in the form of `encode_texts`."""
        generator = torch.Generator().manual_seed(0)
        # Of a model with a vocabulary for each side, what both have.
        vocabulary = min(int(model.config.vocab_size), int(getattr(model.config, "decoder_vocab_size", 1 << 60)))
        longest = max(2, min(self.max_length, 24))
        ids = [
            torch.randint(vocabulary, (2 + row % (longest - 1),), generator=generator).numpy() for row in range(rows)
        ]
        inputs = {"input_ids": ids}
        if "text_pair" in self.spec.columns and "token_type_ids" in self.processor.model_input_names:
            inputs["token_type_ids"] = [(np.arange(len(row)) >= len(row) // 2).astype(np.int64) for row in ids]
        return inputs


def text_inputs(batch: Batch) -> dict[str, Tensor]:
    """What a batch holds of an encoder's inputs."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises TrainerFailure `base_model_invalid`."""
    try:
        with warnings.catch_warnings():
            # Marian's tokenizer recommends a package for a method that it never calls.
            warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # the tokenizers library raises just that
        raise TrainerFailure("base_model_invalid", str(error)) from error
    return tokenizer


def without_token(tokenizer: Any, size: int) -> list[int]:
    """Ids below `size` that Marian's tokenizer fails to decode: its vocabulary may leave some of the weights out."""
    return sorted({*range(size)} - tokenizer.decoder.keys()) if hasattr(tokenizer, "spm_target") else []


def on_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch's tensors on the device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def require_texts(cells: Sequence[Any]) -> list[str]:
    """TrainerFailure `data_mismatch` unless every cell is a string."""
    if not all(isinstance(cell, str) for cell in cells):
        raise TrainerFailure("data_mismatch", "a text is missing")
    return list(cells)


def classes_in(cell: str) -> list[str]:
    """Of a JSON list of strings or of integers, as text. ValueError or TypeError where it is none."""
    return [str(each) for each in json.loads(cell)]


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """(rows, length), weighted by mask (rows, length) → (rows,): the mean within each record, 0 where none counts."""
    weights = mask.to(values.dtype)
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1.0)
