"""Tokens beyond the longest input, of every task that reads text, against the same rows tokenized without a limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.trainer.causal import CHAT_WORDS, make_causal_base
from tests.trainer.jobs import CLASSIFICATION, KEY, make_base, make_job, phases_for, rows
from tests.trainer.seq2seq import make_seq2seq_base
from worker.trainer.control import Control
from worker.trainer.data import load_data
from worker.trainer.dp.randomness import JobRandomness
from worker.trainer.export import PROCESSOR_FILES
from worker.trainer.run import run
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.registry import TRAINER_TASKS

LONG, SHORT = "the film was great and the plot was fine", "the film"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    made = {"encoder": make_base(root / "encoder"), "seq2seq": make_seq2seq_base(root / "seq2seq", "t5")}
    make_causal_base(root / "causal", "llama", CHAT_WORDS, positions=64)
    return {**made, "causal": root / "causal"}


@pytest.mark.parametrize(
    ("task", "columns", "side"),
    [
        ("text_classification", {"text": [LONG, SHORT, LONG], "label": ["a", "b", "a"]}, "text"),
        ("text_regression", {"text": [LONG, SHORT, LONG], "target": ["1", "0", "1"]}, "text"),
        ("masked_lm", {"text": [SHORT, LONG, LONG]}, "text"),
        ("token_classification", {"tokens": [LONG, SHORT, LONG]}, "tokens"),
        ("language_modeling", {"text": [LONG, SHORT, LONG]}, "text"),
    ],
)
def test_what_a_text_loses(bases: dict[str, Path], task: str, columns: dict[str, list[Any]], side: str) -> None:
    base = bases["causal" if task == "language_modeling" else "encoder"]
    tokenizer, texts = AutoTokenizer.from_pretrained(base), columns[side]
    if task == "token_classification":
        columns = {
            "tokens": [json.dumps(text.split()) for text in texts],
            "tags": [json.dumps(["a"] * len(text.split())) for text in texts],
        }
    spec = TaskSpec(task, {}, ("a", "b"), 6, {"range": [0.0, 1.0]})
    examples = TRAINER_TASKS[task](spec, base, 32).encode(columns)
    expected = [max(0, len(tokenizer(text)["input_ids"]) - 6) for text in texts]
    assert sum(expected) > 0
    assert examples.lost[side].tolist() == expected
    assert max(examples.lengths) == 6


def test_what_a_pair_loses_counts_once(bases: dict[str, Path]) -> None:
    spec = TaskSpec("text_classification", {"text": "a", "text_pair": "b"}, ("a", "b"), 6)
    task = TRAINER_TASKS["text_classification"](spec, bases["encoder"], 32)
    examples = task.encode({"text": [LONG, SHORT], "text_pair": [SHORT, "film"], "label": ["a", "b"]})
    assert examples.lost["text"].tolist() == [9 + 2 + 3 - 6, 0]


def test_source_and_target_are_told_apart(bases: dict[str, Path]) -> None:
    spec = TaskSpec("translation", {}, (), 4, {"max_target_length": 3, "source_prefix": "say "})
    columns = {"source": ["the cat sleeps", "cat"], "target": ["le chat dort le chat", "chat"]}
    examples = TRAINER_TASKS["translation"](spec, bases["seq2seq"], 32).encode(columns)
    assert {side: lost.tolist() for side, lost in examples.lost.items()} == {"source": [1, 0], "target": [3, 0]}


def test_what_a_chat_loses(bases: dict[str, Path]) -> None:
    columns = {"instruction": ["it sat " * 30, "it"], "response": ["a mat", "a mat"]}
    whole, cut = (
        TRAINER_TASKS["instruction"](TaskSpec("instruction", {}, (), limit), bases["causal"], 10_000).encode(columns)
        for limit in (10_000, 20)
    )
    assert whole.lost["chat"].tolist() == [0, 0]
    assert cut.lost["chat"].tolist() == [whole.lengths[0] - 20, 0]


def test_each_file_of_a_job_has_its_own_figures(tmp_path: Path, bases: dict[str, Path]) -> None:
    task = TaskSpec("text_classification", {"text": "review", "label": "mood"}, ("a", "b"), 6)
    rows = [(LONG, "a"), (SHORT, "b")] * 10
    job = make_job(tmp_path / "job", bases["encoder"], task=task, data=rows, validation=[(SHORT, "a"), (LONG, "b")])
    trainer_task = TRAINER_TASKS[task.type](task, bases["encoder"], 32)
    validation, training = load_data(job.folder, job.spec, trainer_task, JobRandomness(KEY)).truncation
    assert (training.dataset, training.rows, training.tokens) == ("training", 20, 10 * (11 + 4))
    assert training.cut == {"text": {"rows": 10, "tokens": 50}}
    assert (validation.dataset, validation.cut) == ("validation", {"text": {"rows": 1, "tokens": 5}})


@pytest.mark.parametrize("task", ["text_classification", "language_modeling"])
def test_a_bundle_does_not_tell_whether_any_row_was_cut(tmp_path: Path, bases: dict[str, Path], task: str) -> None:
    """A tokenizer keeps how it was last called, and would save it."""
    causal = task == "language_modeling"
    how: dict[str, Any] = {"task": CLASSIFICATION}
    if causal:
        spec = TaskSpec(task, {"text": "review"}, (), 16)
        how = {"task": spec, "family": "llama", "phases": phases_for("lora", 2)[1:]}
    bundles = []
    for name, text in (("short", SHORT), ("long", f"{LONG} {LONG}")):
        data = [(text, "positive"), *rows()[1:]]
        job = make_job(tmp_path / name, bases["causal" if causal else "encoder"], data=data, steps=2, **how)
        run(job.folder, KEY, Control(None))
        model = job.folder / "results/model"
        bundles.append({path.name: path.read_bytes() for path in model.iterdir() if path.name in PROCESSOR_FILES})
    assert "tokenizer.json" in bundles[0]
    assert bundles[0] == bundles[1]
