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


def binary_cells(true: Tensor, predicted: Tensor) -> Tensor:
    """true, predicted: (rows, classes) bool → (rows, classes · 4) float64: for each class one of the cells neither,
    predicted only, true only, both. The norm of a row is √classes."""
    cells = (2 * true.to(torch.int64) + predicted.to(torch.int64)).cpu()
    return torch.nn.functional.one_hot(cells, 4).flatten(1).to(torch.float64)


def binary_metrics(counts: Tensor, num_units: int, noise_std: float = 0.0) -> dict[str, Any]:
    """counts: (classes, 4), as `binary_cells` has them, summed over units, with noise of that standard deviation.

    accuracy: the share of right decisions over all classes; its interval covers the noise and the finite number of
    units. An undefined ratio counts as 0.
    """
    cells = counts.to(torch.float64)
    classes = len(cells)
    neither, only_predicted, only_true, both = cells.unbind(1)
    precision, recall = ratio(both, both + only_predicted), ratio(both, both + only_true)
    f1 = ratio(2.0 * both, 2.0 * both + only_predicted + only_true)
    total = cells.sum(0)
    accuracy = min(1.0, max(0.0, float((neither + both).sum()) / (num_units * classes)))
    return {
        "accuracy": accuracy,
        "accuracy_interval_95": share_interval(accuracy, num_units, noise_std * math.sqrt(2.0 / classes)),
        "precision_micro": float(ratio(total[3], total[3] + total[1])),
        "recall_micro": float(ratio(total[3], total[3] + total[2])),
        "f1_micro": float(ratio(2.0 * total[3], 2.0 * total[3] + total[1] + total[2])),
        "precision_macro": float(precision.mean()),
        "recall_macro": float(recall.mean()),
        "f1_macro": float(f1.mean()),
        "precision_per_class": precision.tolist(),
        "recall_per_class": recall.tolist(),
        "f1_per_class": f1.tolist(),
        "binary_counts": [[round(value, 2) for value in row] for row in cells.clamp(min=0.0).tolist()],
    }


def binary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """For the model card."""
    low, high = metrics["accuracy_interval_95"]
    return [
        f"- right decisions over all classes {metrics['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})",
        f"- micro F1 {metrics['f1_micro']:.4f}, macro F1 {metrics['f1_macro']:.4f}",
    ]
