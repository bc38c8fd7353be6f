"""The real encoder, where its package is installed: a few hundred made-up sentences, privately, on frozen features."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import pipeline

from app.catalog.bases import BASES
from tests.trainer.jobs import KEY, make_job
from worker.trainer.control import Control
from worker.trainer.run import run

BASE = BASES["all-MiniLM-L6-v2"]


def _sentences() -> list[tuple[str, str]]:
    subjects = (
        "the film",
        "this story",
        "her acting",
        "the music",
        "that ending",
        "the dialogue",
        "the plot",
        "its pace",
    )
    kinds = {
        "positive": ("a delight", "wonderful", "moving and funny", "brilliant", "superb", "a triumph", "charming"),
        "negative": ("a mess", "dreadful", "dull and long", "terrible", "lifeless", "a failure", "annoying"),
    }
    return [
        (f"{subject} was {word}{end}", label)
        for subject in subjects
        for pair in zip(*kinds.values(), strict=True)
        for word, label in zip(pair, kinds, strict=True)
        for end in ("", " from the first minute")
    ]


def test_a_private_head_on_minilm(tmp_path: Path) -> None:
    package = pytest.importorskip(BASE.package, reason=f"the package {BASE.package} carries the real encoder")
    path = Path(package.__file__).parent / BASE.path
    job = make_job(tmp_path / "job", path, data=_sentences(), evaluation="none", steps=60, tokens=2048)
    run(job.folder, KEY, Control(None))
    classify = pipeline("text-classification", model=str(job.folder / "results/model"), device="cpu")
    assert classify("the whole thing was a joy to watch")[0]["label"] == "positive"
    assert classify("an awful waste of two hours")[0]["label"] == "negative"
