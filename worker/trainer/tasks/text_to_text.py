"""Text to text: an encoder reads the source, a decoder learns the target; one mean loss a record over target tokens.

Both texts are cut at their ends, the target's end token stays. Translation and summarization are the same task with
other columns. BLEU, chrF and ROUGE cannot be bounded a record: they are computed on data declared public only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from app.catalog import languages
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks import generated_text, language_tokens
from worker.trainer.tasks.examples import Examples, Indices, lengths_of
from worker.trainer.tasks.interface import (
    FOLDER,
    IGNORED,
    Batch,
    TextTask,
    mean_over_tokens,
    on_device,
    require_texts,
    text_inputs,
    without_token,
)
from worker.trainer.tasks.language_modeling import loss_and_accuracy, loss_lines, loss_metrics, token_losses

_CHUNK = 4096

_USAGE = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForSeq2SeqLM.from_pretrained("{folder}"{options})


{comment}def run(source, {languages}**how):
{before}    inputs = tokenizer({source}, truncation=True, max_length={read}, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens={written}, {told}**how)
    return tokenizer.decode(written[0], skip_special_tokens=True)


print(run({asked}))"""

#: Of models for several languages: which `run` takes, and how they are called.
_BOTH = ("source_lang", "target_lang")
_NAMED = "# Languages by their names in English, such as those of the training rows.\n"
_CODED = "# Languages by the base model's own codes, such as those of the training rows.\n"


class TextToText(TextTask):
    """The task, bound to one job's tokenizer, prefix and lengths."""

    pipeline_tag: ClassVar[str] = "text2text-generation"

    def __init__(self, spec: TaskSpec, base: Path, max_length: int) -> None:
        super().__init__(spec, base, max_length)
        self.prefix = str(spec.options.get("source_prefix") or "")
        self.languages_of = str(spec.options.get("languages_of") or "")
        self.max_target_length = min(int(spec.options.get("max_target_length") or spec.max_length), max_length)
        self._references: list[str] = []
        # Of a base whose texts begin with a token of their language: from which into which, unless rows say so.
        self.pair: tuple[str, str] | None = None
        if language_tokens.are_read(self.processor) and not self.languages_of:
            self.pair = (str(spec.options["source_lang"]), str(spec.options["target_lang"]))
            language_tokens.tell(self.processor, *self.pair)

    def prepare(self, model: PreTrainedModel) -> None:
        """Makes the model write the job's target language. TrainerFailure `base_model_invalid`."""
        super().prepare(model)
        if language_tokens.are_read(self.processor):
            generating: Any = model.generation_config
            token = None if self.pair is None else language_tokens.token_id(self.processor, self.pair[1])
            generating.forced_bos_token_id = None
            setting = language_tokens.told_to_write(self.processor)
            setattr(generating, setting, token)
            if setting == "decoder_start_token_id":  # which older code looks for there
                model.config.decoder_start_token_id = token

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> Examples:
        """Roles `source`, `target`, and both languages where rows have their own.

        The tensor `row` says which of the references is a row's own."""
        sources, targets = require_texts(columns["source"]), require_texts(columns["target"])
        first = len(self._references)
        self._references += targets
        texts = [before + source for before, source in zip(self._prefixes(columns), sources, strict=True)]
        inputs, labels = [np.empty(0, dtype=np.int64)] * len(texts), [np.empty(0, dtype=np.int64)] * len(texts)
        lost = {side: np.zeros(len(texts), dtype=np.int64) for side in ("source", "target")}
        for rows in self._in_one_language(columns, len(texts)):
            read = {"text": [texts[row] for row in rows]}
            said = {"text_target": [targets[row] for row in rows]}
            encoded, wanted = self._encoded(read, self.max_length), self._encoded(said, self.max_target_length)
            lost["source"][rows] = self.tokens_lost(encoded, self.max_length, read)
            lost["target"][rows] = self.tokens_lost(wanted, self.max_target_length, said)
            for row, ids, label in zip(rows, encoded, wanted, strict=True):
                inputs[row], labels[row] = ids, label
        examples = self._examples(inputs, labels, torch.arange(first, first + len(targets)))
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
        shifted = _decoder_inputs(model, batch["labels"])
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
        return [
            f"Sources are cut to {self.max_length} tokens, targets were cut to {self.max_target_length}.",
            *self._told(),
        ]

    def usage(self, options: str = "") -> str:
        """By generate(): transformers' pipelines for such models are gone (5.0)."""
        says, taken, token = self._says(), self._languages_taken(), ""
        if taken and not says:
            setting = language_tokens.told_to_write(self.processor)
            token = f"{setting}={language_tokens.in_python(self.processor, 'target_lang')}, "
        quoted = ("f" if taken else "") + json.dumps(says, ensure_ascii=False)
        return _USAGE.format(
            folder=FOLDER,
            options=options,
            comment=(_NAMED if says and taken == _BOTH else _CODED) if taken else "",
            languages="".join(f"{name}, " for name in taken),
            before="    tokenizer.src_lang = source_lang\n" if token else "",
            source=f"{quoted} + source" if says else "source",
            read=self.max_length,
            written=self.max_target_length,
            told=token,
            asked=", ".join(['"A text of yours."', *(f'"{name.upper()}"' for name in taken)]),
        )

    def _languages_taken(self) -> tuple[str, ...]:
        """By `run` of the model card, where rows have languages of their own."""
        if not self.languages_of:
            return ()
        says = self._says()
        return tuple(name for name in _BOTH if not says or f"{{{name}}}" in says)

    def _told(self) -> list[str]:
        if self.pair is not None:
            return [
                f"It translates from {self.pair[0]} into {self.pair[1]}: tokenizer and generation_config are set so."
            ]
        if language_tokens.are_read(self.processor):
            return [
                "It was trained on several languages: set the tokenizer's src_lang, and give generate() the token of "
                f"the language to write as {language_tokens.told_to_write(self.processor)}."
            ]
        says = self._says()
        if not says:
            return []
        filled = ", filled in," if self._languages_taken() else ","
        return [f"Every source must begin with {says!r}{filled} as in training."]

    def _says(self) -> str:
        """What stands before a source; where rows have languages of their own, with their names in braces."""
        if self.pair is not None or language_tokens.are_read(self.processor):
            return ""
        if self.prefix or not self.languages_of:
            return self.prefix
        return languages.prefix(self.languages_of, *(f"{{{name}}}" for name in _BOTH))

    def _in_one_language(self, columns: Mapping[str, Sequence[Any]], count: int) -> Iterator[list[int]]:
        """Rows that the tokenizer reads alike, which is told so before each group; mostly all of them."""
        if self.pair is not None or not language_tokens.are_read(self.processor):
            yield list(range(count))
            return
        before = self.processor.src_lang, self.processor.tgt_lang
        groups: dict[tuple[str, str], list[int]] = {}
        pairs = zip(require_texts(columns["source_lang"]), require_texts(columns["target_lang"]), strict=True)
        for row, pair in enumerate(pairs):
            groups.setdefault(pair, []).append(row)
        for pair, rows in groups.items():
            language_tokens.tell(self.processor, *pair)
            yield rows
        self.processor.src_lang, self.processor.tgt_lang = before

    def _prefixes(self, columns: Mapping[str, Sequence[Any]]) -> list[str]:
        """Of each row."""
        if not self.languages_of or language_tokens.are_read(self.processor):
            return [self.prefix] * len(columns["source"])
        pairs = zip(require_texts(columns["source_lang"]), require_texts(columns["target_lang"]), strict=True)
        return [languages.prefix(self.languages_of, *pair) for pair in pairs]

    @torch.inference_mode()
    def _write(self, model: Any, examples: Examples, rows: Indices) -> list[str]:
        """Greedily, a few rows at a time; of rows with languages of their own those of one target's together."""
        longest = min(self.max_target_length, generated_text.MAX_TOKENS)
        written_size = int(getattr(model.config, "decoder_vocab_size", model.config.vocab_size))
        languages_of: dict[int | None, list[int]] = {}
        several = self.pair is None and language_tokens.are_read(self.processor)
        setting = language_tokens.told_to_write(self.processor)
        place = -1 if setting == "decoder_start_token_id" else 0
        for row in rows:
            token = int(examples.sequences["labels"][row][place]) if several else None
            languages_of.setdefault(token, []).append(int(row))
        written: dict[int, str] = {}
        for token, alike in languages_of.items():
            how = _greedy(model, longest, {} if token is None else {setting: token})
            how.suppress_tokens = without_token(self.processor, written_size) or None
            for start in range(0, len(alike), generated_text.ROWS_AT_ONCE):
                chosen = alike[start : start + generated_text.ROWS_AT_ONCE]
                inputs = text_inputs(self.batch(examples, chosen, model.device))
                answers = model.generate(**inputs, generation_config=how)
                written |= zip(chosen, self.processor.batch_decode(answers, skip_special_tokens=True), strict=True)
        return [written[int(row)] for row in rows]

    def _encoded(self, texts: Mapping[str, list[str]], longest: int) -> list[np.ndarray]:
        """texts: of one side, by the name of the tokenizer's parameter."""
        encoded: list[np.ndarray] = []
        ((side, all_of_it),) = texts.items()
        for start in range(0, len(all_of_it), _CHUNK):
            piece: Any = {side: all_of_it[start : start + _CHUNK]}
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


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """labels (rows, length), IGNORED behind the end → the same moved by one, as the model itself does it."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        moved: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return moved
    start = torch.full_like(labels[:, :1], int(model.config.decoder_start_token_id))  # M2M-100 has no method for it
    before = torch.cat([start, labels[:, :-1]], 1)
    return before.masked_fill(before == IGNORED, int(model.config.pad_token_id))


def _greedy(model: PreTrainedModel, longest: int, other: Mapping[str, int]) -> GenerationConfig:
    """The model's own special tokens, but for others, and none of its search."""
    own = model.generation_config
    assert own is not None
    configuration: Any = GenerationConfig
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
    tokens = {name: getattr(own, name, None) for name in names} | dict(other)
    made: GenerationConfig = configuration(**tokens, max_new_tokens=longest, do_sample=False, num_beams=1)
    return made
