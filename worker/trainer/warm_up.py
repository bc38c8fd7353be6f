"""What a process does slowly once, done by a spare before its job comes: a made-up job on a tiny random encoder.

Libraries load modules, build tables and start threads at the first use; together that takes longer than a small job's
way to its first step. The rows are made up, the key is a constant, and the folder is gone before an order is read.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import BertConfig, BertModel, BertTokenizer

from app.catalog.adaptations import Head, Lora
from app.catalog.families import FAMILIES as CATALOG
from app.catalog.recipes import HEAD_PHASE, MAIN_PHASE, Phase, Recipe
from app.privacy.plan import PrivacyPlan
from worker.trainer.control import Control
from worker.trainer.failure import StopRequested
from worker.trainer.families.registry import FAMILIES
from worker.trainer.run import run
from worker.trainer.spec import TRAINING_FILE, BaseSpec, DataSpec, RuntimeOptions, TaskSpec, TrainerSpec

_LABELS = ("no", "yes")
_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LABELS)
_ROWS = 8


def warm_up(order_waits: Callable[[], bool]) -> None:
    """Returns early, between two parts, once `order_waits`. A failure is told on standard error, and no more: the job
    then finds its process colder."""
    try:
        with tempfile.TemporaryDirectory(prefix="warm-up-") as folder, contextlib.suppress(StopRequested):
            control = _Impatient(order_waits)
            make_job(Path(folder))
            control.check()
            run(Path(folder), bytes(32), control)
            for family in (name for name in FAMILIES if not CATALOG[name].auto_map):  # those are ours
                control.check()
                name = family.replace("-", "_")
                importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    except Exception as error:  # whatever it is, the job will tell where it matters
        print(f"not warm: {type(error).__name__}", file=sys.stderr)  # noqa: T201


class _Impatient(Control):
    """Without a supervisor; asked to stop once an order waits."""

    def __init__(self, order_waits: Callable[[], bool]) -> None:
        super().__init__(None)
        self._order_waits = order_waits

    @property
    def stop_requested(self) -> bool:
        """Looked at between steps."""
        return self._order_waits()

    def check(self) -> None:
        """Raises StopRequested. Unlike the others' it is no collective: there is one rank, of none."""
        if self._order_waits():
            raise StopRequested


def make_job(folder: Path) -> TrainerSpec:
    """Lays out a job of two steps: a warm head, then LoRA behind it; nothing is evaluated."""
    base = folder / "base"
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes["intermediate_size"] = 64
    BertModel(BertConfig(vocab_size=len(_WORDS), max_position_embeddings=64, **sizes)).save_pretrained(base)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(_WORDS), encoding="utf-8")
    BertTokenizer(vocab=str(vocabulary)).save_pretrained(base)
    answers = [_LABELS[row % 2] for row in range(_ROWS)]
    (folder / TRAINING_FILE).parent.mkdir()
    pq.write_table(pa.table({"text": answers, "label": answers}), folder / TRAINING_FILE)
    phases = (
        Phase(HEAD_PHASE, Head(), 1.0, 1, 0.1, 0.1, noise_ratio=1.0, averaging=0.9),
        Phase(MAIN_PHASE, Lora(), 1.0, 1, 1e-3, 1e-3),
    )
    recipe = Recipe(phases, "automatic", 1.0, centring_noise_multiplier=1.0)
    plan = PrivacyPlan(
        mechanism="dp_sgd", num_units=_ROWS, parts=recipe.parts(1.0), target_epsilon=1.0, target_delta=0.1
    )
    spec = TrainerSpec(
        job_id="warm-up",
        task=TaskSpec("text_classification", {"text": "text", "label": "label"}, _LABELS, max_length=32),
        base=BaseSpec("tiny", "bert", str(base)),
        phases=phases,
        plan=plan,
        data=DataSpec(_ROWS, 0, has_validation_file=False),
        evaluation="none",
        dataset_digest="0" * 64,
        runtime=RuntimeOptions(device="cpu"),  # a waiting spare keeps no GPU's memory
    )
    spec.write(folder)
    return spec
