"""Evaluation: one confusion matrix over units that were not trained on, and what may leave of it.

A unit counts once, by the mean over its rows of where they fall: cells that add up to 1, so that their L2 norm is at
most 1, the sensitivity under zero_out. Private: the counts are noised, and everything else is computed from the noised
counts. Public: exact, on data declared public. The number of evaluated units is public in either case; exact private
counts never leave this module.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from app.catalog.recipes import EVALUATION
from app.privacy.plan import GaussianRelease
from worker.trainer.checkpoint import State
from worker.trainer.data import Dataset
from worker.trainer.dp.reduce import sum_over_ranks_
from worker.trainer.dp.release import gaussian_release
from worker.trainer.job import Job
from worker.trainer.loop import progress

_Z95 = 1.959964


def evaluate(job: Job, dataset: Dataset | None, state: State) -> dict[str, Any]:
    """The content of metrics.json: only what is cleared to leave."""
    if job.spec.evaluation == "none":
        return {"released": "none", "reason": "no evaluation was asked for: nothing about private rows was measured"}
    assert dataset is not None
    # A file declared public has no units but its records.
    by_column = job.spec.plan.privacy_unit.column is not None and job.spec.evaluation == "private"
    evaluated = {
        "dataset": "validation_file" if job.spec.data.has_validation_file else "held_out_split",
        "num_units": dataset.num_units,
        "averaged_over": "units" if by_column else "records",
        "labels": list(job.spec.task.labels),
    }
    counts = confusion_counts(job, dataset)
    if job.spec.evaluation == "public":
        return {
            "released": "public",
            "method": "exact, on data declared public",
            **evaluated,
            **metrics(counts, dataset.num_units),
        }
    part = job.spec.plan.part(EVALUATION)
    assert isinstance(part, GaussianRelease)
    noised = gaussian_release(job.randomness, part, counts)
    state.executed[EVALUATION] = 1
    job.control.progress(progress(job, state), last=True)
    std = part.noise_multiplier * part.sensitivity
    return {
        "released": "private",
        "method": "Gaussian noise on the confusion counts, charged to the plan; the rest follows from them",
        "noise_std": std,
        **evaluated,
        **metrics(noised, dataset.num_units, std),
    }


@torch.inference_mode()
def confusion_counts(job: Job, dataset: Dataset) -> Tensor:
    """Exact counts (classes, classes), float64, rows by true class, columns by predicted one. Private.

    They add up to the number of units: of a unit with k rows, each row counts 1/k.
    """
    classes = len(job.spec.task.labels)
    counts = torch.zeros(classes * classes, dtype=torch.float64)
    weights = dataset.weight_of_row
    for chosen, batch in job.shared_batches(dataset.examples, dataset.single_rows):
        # In float32 whatever the training computes in: one unit must not move where another one falls.
        predicted = job.task.logits(job.model, batch).argmax(1)
        cells = (batch["labels"] * classes + predicted).cpu()
        counts += torch.bincount(cells, weights[torch.from_numpy(chosen)], minlength=classes * classes)
    sum_over_ranks_([counts])
    return counts.view(classes, classes)


def metrics(counts: Tensor, num_units: int, noise_std: float = 0.0) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 from counts with noise of that standard deviation.

    counts: (classes, classes), true class by predicted class; may be negative under noise. Sums are taken before
    negative values are cut off, which keeps them unbiased. The interval on accuracy covers both the noise and the
    finite number of units: where a unit counts by the mean over its rows, its share of right ones lies in [0, 1], and
    the variance over units is at most the one taken here, of shares that are 0 or 1. An undefined ratio counts as 0.
    """
    matrix = counts.to(torch.float64)
    classes = len(matrix)
    correct = matrix.diagonal()
    true, predicted = matrix.sum(1), matrix.sum(0)
    precision, recall = _ratio(correct, predicted), _ratio(correct, true)
    f1 = _ratio(2.0 * correct, true + predicted)
    accuracy = min(1.0, max(0.0, float(correct.sum()) / num_units))
    sampling = accuracy * (1.0 - accuracy) / num_units
    half_width = _Z95 * math.sqrt(sampling + classes * (noise_std / num_units) ** 2)
    shown = matrix.clamp(min=0.0)
    return {
        "accuracy": accuracy,
        "accuracy_interval_95": [max(0.0, accuracy - half_width), min(1.0, accuracy + half_width)],
        "precision_macro": float(precision.mean()),
        "recall_macro": float(recall.mean()),
        "f1_macro": float(f1.mean()),
        "f1_micro": accuracy,
        "precision_per_class": precision.tolist(),
        "recall_per_class": recall.tolist(),
        "f1_per_class": f1.tolist(),
        "confusion_matrix": [[round(value, 2) for value in row] for row in shown.tolist()],
    }


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    defined = denominator > 0.0
    return torch.where(defined, numerator / denominator.where(defined, torch.ones_like(denominator)), 0.0).clamp(
        0.0, 1.0
    )
