"""Metrics against scikit-learn, and that only noised counts leave a private job."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as oracle
from torch import Tensor

from tests.trainer.jobs import KEY, make_job, rows
from worker.trainer import evaluate
from worker.trainer.control import Control
from worker.trainer.run import run
from worker.trainer.tasks.confusion import confusion_metrics


def test_exact_metrics_are_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    true, predicted = generator.integers(0, 4, 300), generator.integers(0, 3, 300)  # class 3 is never predicted
    counts = torch.from_numpy(oracle.confusion_matrix(true, predicted, labels=range(4)))
    got = confusion_metrics(counts, 300)
    assert got["accuracy"] == pytest.approx(oracle.accuracy_score(true, predicted))
    assert got["f1_micro"] == pytest.approx(oracle.f1_score(true, predicted, average="micro"))
    for name, score in (
        ("precision", oracle.precision_score),
        ("recall", oracle.recall_score),
        ("f1", oracle.f1_score),
    ):
        options = {"labels": range(4), "zero_division": 0}
        assert got[f"{name}_macro"] == pytest.approx(score(true, predicted, average="macro", **options))
        assert got[f"{name}_per_class"] == pytest.approx(score(true, predicted, average=None, **options).tolist())
    assert got["confusion_matrix"] == counts.tolist()


def test_the_interval_covers_the_true_accuracy_under_noise() -> None:
    """95 % of the time: over sampled rows and noise, at a noise that matters."""
    generator = torch.Generator().manual_seed(0)
    covered, rounds, units, truth, std = 0, 1000, 200, 0.8, 8.0
    for _ in range(rounds):
        right = int(torch.binomial(torch.tensor(float(units)), torch.tensor(truth), generator=generator))
        exact = torch.tensor([[right / 2, (units - right) / 2], [(units - right) / 2, right / 2]])
        noised = exact + std * torch.randn(2, 2, generator=generator)
        low, high = confusion_metrics(noised, units, std)["accuracy_interval_95"]
        covered += low <= truth <= high
    assert 0.93 <= covered / rounds <= 0.97


def test_metrics_of_mere_noise_stay_in_range() -> None:
    noised = 50.0 * torch.randn(5, 5, generator=torch.Generator().manual_seed(3))
    got = confusion_metrics(noised, 10, 50.0)
    values = [got["accuracy"], *got["accuracy_interval_95"], *got["f1_per_class"], *got["precision_per_class"]]
    assert all(0.0 <= value <= 1.0 for value in values)
    assert min(min(row) for row in got["confusion_matrix"]) >= 0.0


@pytest.mark.parametrize("validation", [None, 40], ids=["split", "file"])
def test_a_private_job_releases_noised_counts_and_what_follows_from_them(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, validation: int | None
) -> None:
    counted: list[Tensor] = []
    released: list[Tensor] = []
    exact, release = evaluate.statistics, evaluate.gaussian_release
    monkeypatch.setattr(evaluate, "statistics", lambda *a: counted.append(exact(*a)) or counted[0])
    monkeypatch.setattr(evaluate, "gaussian_release", lambda *a: released.append(release(*a)) or released[0])
    job = make_job(tmp_path / "job", base, validation=rows(validation) if validation else None)
    run(job.folder, KEY, Control(None))
    got, units = job.metrics(), validation or 12
    assert len(counted) == len(released) == 1
    assert float(counted[0].sum()) == units
    assert (got["released"], got["noise_std"], got["num_units"]) == ("private", 2.0, units)
    expected = confusion_metrics(released[0].view(2, 2), units, 2.0)
    assert {name: got[name] for name in expected} == expected
    leaked = confusion_metrics(counted[0].view(2, 2), units, 2.0)
    assert got["accuracy"] != leaked["accuracy"]
    assert got["confusion_matrix"] != leaked["confusion_matrix"]
    assert json.loads((job.folder / "results/model/metrics.json").read_text()) == got


def test_public_metrics_are_exact(tmp_path: Path, base: Path) -> None:
    job = make_job(tmp_path / "job", base, evaluation="public", validation=rows(40))
    run(job.folder, KEY, Control(None))
    got = job.metrics()
    assert got["released"] == "public"
    assert sum(map(sum, got["confusion_matrix"])) == 40
    assert "weights are what the guarantee covers" in (job.folder / "results/model/README.md").read_text()
