"""Nothing packs: every record is one sequence of its own, so that no two privacy units ever meet in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.catalog.tasks import TASKS
from tests.trainer.causal import CHAT_WORDS, make_causal_base
from tests.trainer.images import make_image_base, picture
from tests.trainer.jobs import make_base
from tests.trainer.seq2seq import make_seq2seq_base
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.examples import Examples
from worker.trainer.tasks.registry import TRAINER_TASKS

WORDS = ("the film was great", "a plot", "the plot is fine and the film bad", "film", "great great", "is it")
LABELS = ("a", "b")


def cell(role: str, row: int) -> Any:
    """Of a row, in the form that the role has."""
    text = WORDS[row % len(WORDS)]
    match role:
        case "label":
            return LABELS[row % 2]
        case "image":
            return picture(row % 2 == 1, row)
        case "tokens":
            return json.dumps(text.split())
        case "tags":
            return json.dumps([LABELS[row % 2]] * len(text.split()))
        case "messages":
            asked, told = {"role": "user", "content": text}, {"role": "assistant", "content": "it sat"}
            return json.dumps([asked, told])
    return text


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    make_causal_base(root / "causal", "llama", CHAT_WORDS, positions=64)
    encoder, image = make_base(root / "encoder"), make_image_base(root / "image", "vit")
    seq2seq = make_seq2seq_base(root / "seq2seq", "t5")
    by_class = {"causal_lm": root / "causal", "seq2seq_lm": seq2seq, "image_classification": image}
    return {name: by_class.get(task.model, encoder) for name, task in TASKS.items()}


def rows_of(examples: Examples, row: int) -> list[Any]:
    """All that the model and the loss read of one row, but for its own number."""
    tensors = [values[row].tolist() for name, values in examples.tensors.items() if name != "row"]
    return [*(np.asarray(values[row]).tolist() for values in examples.sequences.values()), *tensors]


@pytest.mark.parametrize("name", TASKS)
def test_a_record_is_one_sequence_and_reads_no_other(bases: dict[str, Path], name: str) -> None:
    """One row becomes another, or goes: the others stay as they were, to the token."""
    spec = TaskSpec(name, {}, LABELS if TASKS[name].labelled else (), 64, {"range": [0.0, 9.0]})
    task = TRAINER_TASKS[name](spec, bases[name], 64)
    roles = [role.role for role in TASKS[name].columns if role.required]

    def encoded(numbers: list[int]) -> Examples:
        target = name == "text_regression"
        columns = {
            role: [str(n % 9) if target and role == "target" else cell(role, n) for n in numbers] for role in roles
        }
        return task.encode(columns)

    whole, changed, fewer = encoded([0, 1, 2, 3, 4]), encoded([0, 1, 5, 3, 4]), encoded([0, 1, 3, 4])
    assert (len(whole), len(changed), len(fewer)) == (5, 5, 4)
    for row in (0, 1, 3, 4):
        assert rows_of(whole, row) == rows_of(changed, row) == rows_of(fewer, row - (row > 2))
    assert rows_of(whole, 2) != rows_of(changed, 2)
