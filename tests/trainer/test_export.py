"""What the export check catches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer.jobs import KEY, make_job
from worker.trainer import export as export_module
from worker.trainer.control import Control
from worker.trainer.dp.scalars import StepRelease
from worker.trainer.dp.step import PrivateStep
from worker.trainer.failure import TrainerFailure
from worker.trainer.run import run


def _refused(job_folder: Path) -> None:
    with pytest.raises(TrainerFailure) as caught:
        run(job_folder, KEY, Control(None))
    assert caught.value.code == "export_check_failed"
    assert not (job_folder / "results/model").exists()


def test_parameters_that_were_trained_and_did_not_move(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(self: PrivateStep, step: int, micro_batches: object) -> StepRelease:
        frozen = dict(list(self._parameters.items())[:1])
        before = {name: parameter.detach().clone() for name, parameter in frozen.items()}
        released = original(self, step, micro_batches)  # type: ignore[arg-type]
        with torch.no_grad():
            for name, parameter in frozen.items():
                parameter.copy_(before[name])
        return released

    original = PrivateStep.run
    monkeypatch.setattr(PrivateStep, "run", forgetful)
    _refused(make_job(tmp_path / "job", base, adaptation="bitfit").folder)


def test_weights_that_are_not_finite(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(self: PrivateStep, step: int, micro_batches: object) -> StepRelease:
        for parameter in self._parameters.values():
            parameter.data.fill_(torch.inf)
        return StepRelease()

    monkeypatch.setattr(PrivateStep, "run", diverging)
    _refused(make_job(tmp_path / "job", base, loss_bound=None).folder)


@pytest.mark.parametrize("damage", ["weights", "labels"])
def test_a_bundle_that_is_not_the_trained_model(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    checked = export_module._check_reloaded

    def damaged(job: object, folder: Path, answers: object) -> None:
        if damage == "weights":
            weights = load_file(folder / "model.safetensors")
            weights["classifier.bias"] += 0.01
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        else:
            config = (folder / "config.json").read_text()
            (folder / "config.json").write_text(config.replace('"0": "negative"', '"0": "other"'))
        checked(job, folder, answers)  # type: ignore[arg-type]

    monkeypatch.setattr(export_module, "_check_reloaded", damaged)
    _refused(make_job(tmp_path / "job", base).folder)


def test_what_else_a_library_writes_stays_out(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = export_module.model_card

    def littering(*arguments: Any, **named: Any) -> str:
        for folder in (tmp_path / "job/results").glob(".model*"):
            (folder / "training_args.bin").write_bytes(b"x")
            (folder / "runs").mkdir()
        return card(*arguments, **named)

    monkeypatch.setattr(export_module, "model_card", littering)
    job = make_job(tmp_path / "job", base)
    run(job.folder, KEY, Control(None))
    names = {path.name for path in (job.folder / "results/model").iterdir()}
    assert names <= set(export_module.BUNDLE_FILES)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "metrics.json"} <= names
