"""A spare's warm-up: it runs to its end, stops for an order, and leaves nothing to the job that comes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.jobs import KEY, make_job
from worker.trainer import warm_up
from worker.trainer.control import Control
from worker.trainer.run import run


def test_it_trains_to_the_end_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    looked = 0

    def order_waits() -> bool:
        nonlocal looked
        looked += 1
        return False

    warm_up.warm_up(order_waits)
    assert "not warm" not in capsys.readouterr().err
    assert looked > len(warm_up.FAMILIES)  # the imports behind the training were reached
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", range(4))
def test_an_order_ends_it_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], after: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    looks = iter([False] * after)
    warm_up.warm_up(lambda: next(looks, True))
    assert "not warm" not in capsys.readouterr().err
    assert next(looks, None) is None
    assert list(tmp_path.iterdir()) == []


def test_what_fails_in_it_ends_no_spare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(folder: Path) -> None:
        raise RuntimeError("no warmth")

    monkeypatch.setattr(warm_up, "make_job", broken)
    warm_up.warm_up(lambda: False)
    assert capsys.readouterr().err == "not warm: RuntimeError\n"


@pytest.mark.parametrize("adaptation", ["head", "lora"])
def test_the_same_job_comes_out_of_a_warm_process_and_of_a_cold_one(
    tmp_path: Path, base: Path, adaptation: str
) -> None:
    bundles = []
    for name in ("cold", "warm"):
        job = make_job(tmp_path / name, base, adaptation=adaptation)
        if name == "warm":
            torch.manual_seed(99)
            warm_up.warm_up(lambda: False)
        run(job.folder, KEY, Control(None))
        bundles.append(load_file(job.folder / "results/model/model.safetensors"))
    assert bundles[0].keys() == bundles[1].keys()
    assert all(torch.equal(bundles[0][key], bundles[1][key]) for key in bundles[0])
