"""Which tokens a step of masked language modeling hides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from app.catalog.recipes import MAIN_PHASE, Phase
from tests.trainer.encoders import MASKED, make_encoder_base
from tests.trainer.jobs import ADAPTATIONS, KEY, make_job
from worker.trainer.control import Control
from worker.trainer.run import run
from worker.trainer.tasks.examples import Examples
from worker.trainer.tasks.interface import IGNORED
from worker.trainer.tasks.masked_lm import MaskedLanguageModeling


def test_each_step_hides_other_tokens_and_a_replayed_step_the_same(tmp_path: Path) -> None:
    base = make_encoder_base(tmp_path / "base", "masked", "bert")
    task = MaskedLanguageModeling(MASKED, base, 16)
    whole = task.encode({"text": ["the film was a plot the film is good " * 2] * 2 + ["the plot was bad"]})
    names = ("input_ids", "labels")

    def at(key: bytes, examples: Examples = whole, rows: Sequence[int] = (0, 2)) -> list[list[list[int]]]:
        read = task.at_step(examples, rows, key)
        assert read.lengths.tolist() == examples.lengths.tolist()
        return [[read.sequences[name][row].tolist() for row in range(len(read))] for name in names]

    untouched = [[whole.sequences[name][row].tolist() for row in range(3)] for name in names]
    steps = [at(bytes([step])) for step in range(20)]
    assert [at(bytes([step])) for step in range(20)] == steps
    assert [[whole.sequences[name][row].tolist() for row in range(3)] for name in names] == untouched
    texts = set()
    for inputs, labels in steps:
        assert (inputs[1], labels[1]) == (untouched[0][1], untouched[1][1])  # not drawn
        texts.add(tuple(ids if label == IGNORED else label for ids, label in zip(inputs[0], labels[0], strict=True)))
        assert {labels[0][0], labels[0][-1]} == {IGNORED}  # [CLS], [SEP]
    assert len(texts) == 1, "what is hidden is the row's own"
    assert len({tuple(labels[0]) for _, labels in steps}) > 15
    again = task.at_step(task.at_step(whole, [0], b"a"), [0], b"b")
    assert again.sequences["labels"][0].tolist() == at(b"b")[1][0]
    moved = at(b"x", whole.select([2, 0]), [0, 1])
    assert [each[::-1] for each in moved] == [[each[0], each[2]] for each in at(b"x")]


def test_training_reads_each_steps_own_hidden_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_encoder_base(tmp_path / "base", "masked", "bert")
    read: list[list[list[int]]] = []
    loss = MaskedLanguageModeling.loss

    def seen(self: MaskedLanguageModeling, outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(batch["labels"]) == 48:  # all that are not held out
            read.append(sorted(batch["labels"].tolist()))
        return loss(self, outputs, batch)

    monkeypatch.setattr(MaskedLanguageModeling, "loss", seen)
    for name in ("first", "again"):
        phases = (Phase(MAIN_PHASE, ADAPTATIONS["bitfit"], 1.0, 3, 1e-2, 1e-2),)
        task = dataclasses.replace(MASKED, columns={"text": "review"})
        run(make_job(tmp_path / name, base, task=task, phases=phases, tokens=10_000).folder, KEY, Control(None))
    first, again = read[: len(read) // 2], read[len(read) // 2 :]
    assert first == again
    assert len(first) == 3
    assert first[0] != first[1] != first[2] != first[0]
