"""Checkpoints that can be taken: what a job of just those steps would have ended with; the job itself is the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from app.catalog.adaptations import Head
from app.catalog.recipes import HEAD_PHASE, MAIN_PHASE, Phase
from tests.trainer.jobs import ADAPTATIONS, KEY, MadeJob, make_job
from worker.trainer.control import Control
from worker.trainer.run import run


def _phases(head: int, main: int | None, adaptation: str = "lora") -> tuple[Phase, ...]:
    first = Phase(HEAD_PHASE, Head(), 0.5, head, 0.2, 0.2, averaging=0.9)
    if main is None:
        return (first,)
    return (first, Phase(MAIN_PHASE, ADAPTATIONS[adaptation], 0.25, main, 1e-2, 1e-2, averaging=0.5))


def _run(job: MadeJob, published: tuple[int, ...] = ()) -> MadeJob:
    spec = dataclasses.replace(job.spec, published_steps=published)
    spec.write(job.folder)
    run(job.folder, KEY, Control(None))
    return dataclasses.replace(job, spec=spec)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "results/model/model.safetensors")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_a_checkpoint_is_the_model_of_a_shorter_job(tmp_path: Path, base: Path, adaptation: str) -> None:
    whole = _run(make_job(tmp_path / "whole", base, phases=_phases(3, 3, adaptation)), published=(3, 6))
    undisturbed = _run(make_job(tmp_path / "undisturbed", base, phases=_phases(3, 3, adaptation)))
    assert _same(_weights(whole.folder), _weights(undisturbed.folder))
    assert whole.metrics() == undisturbed.metrics()
    assert sorted(path.name for path in (whole.folder / "taken").iterdir()) == ["3", "6"]

    # The centring, and two steps of the head alone: the body is the base's, the head answers.
    head_only = _run(make_job(tmp_path / "head", base, phases=_phases(2, None)))
    assert _same(_weights(whole.folder / "taken/3"), _weights(head_only.folder))
    # Two steps into the second phase.
    shorter = _run(make_job(tmp_path / "shorter", base, phases=_phases(3, 2, adaptation)))
    assert _same(_weights(whole.folder / "taken/6"), _weights(shorter.folder))


def test_a_checkpoint_brings_no_metrics_and_says_what_it_is(tmp_path: Path, base: Path) -> None:
    job = _run(make_job(tmp_path / "job", base, steps=4), published=(3,))
    taken = job.folder / "taken/3/results"
    assert json.loads((taken / "metrics.json").read_text()).keys() == {"released", "reason", "train_loss_curve"}
    card = (taken / "model/README.md").read_text()
    assert "**checkpoint**, taken at step 3 of 6" in card
    assert "No metrics were released" in card
    assert {path.name for path in (taken / "model").iterdir()} == {
        path.name for path in (job.folder / "results/model").iterdir()
    }
