"""A confusion matrix as released statistics, and the metrics that follow from its (noised) counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Z95 = 1.959964


def confusion_cells(true: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """true, predicted: (rows,) class indices → one-hot cells (rows, classes²) float64, true class by predicted one."""
    cells = (true * classes + predicted).cpu()
    return torch.nn.functional.one_hot(cells, classes * classes).to(torch.float64)


def confusion_metrics(counts: Tensor, num_units: int, noise_std: float = 0.0) -> dict[str, Any]:
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
    precision, recall = ratio(correct, predicted), ratio(correct, true)
    f1 = ratio(2.0 * correct, true + predicted)
    accuracy = min(1.0, max(0.0, float(correct.sum()) / num_units))
    interval = share_interval(accuracy, num_units, noise_std * math.sqrt(classes))
    shown = matrix.clamp(min=0.0)
    return {
        "accuracy": accuracy,
        "accuracy_interval_95": interval,
        "precision_macro": float(precision.mean()),
        "recall_macro": float(recall.mean()),
        "f1_macro": float(f1.mean()),
        "f1_micro": accuracy,
        "precision_per_class": precision.tolist(),
        "recall_per_class": recall.tolist(),
        "f1_per_class": f1.tolist(),
        "confusion_matrix": [[round(value, 2) for value in row] for row in shown.tolist()],
    }


def share_interval(share: float, num_units: int, noise_std: float) -> list[float]:
    """95 % interval of a mean over units of shares in [0, 1], whose sum carries noise of that standard deviation."""
    half_width = Z95 * math.sqrt(share * (1.0 - share) / num_units + (noise_std / num_units) ** 2)
    return [max(0.0, share - half_width), min(1.0, share + half_width)]


def card_lines(metrics: Mapping[str, Any]) -> list[str]:
    """For the model card."""
    low, high = metrics["accuracy_interval_95"]
    return [
        f"- accuracy {metrics['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})",
        f"- macro F1 {metrics['f1_macro']:.4f}, precision {metrics['precision_macro']:.4f}, "
        f"recall {metrics['recall_macro']:.4f}",
    ]


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Elementwise, within [0, 1]; 0 where the denominator is not positive."""
    defined = denominator > 0.0
    return torch.where(defined, numerator / denominator.where(defined, torch.ones_like(denominator)), 0.0).clamp(
        0.0, 1.0
    )
