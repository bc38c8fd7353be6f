"""A confusion matrix as released statistics, and the metrics that follow from its (noised) counts.

Under noise only what can be read is told, and the rest is named in `not_released`: the accuracy where the noise's
half-width is 0.5, a class's precision, recall or F1 (null then) where it is half of what the ratio divides by, and the
mean over classes where it is that on average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from worker.trainer.tasks.noise import MOST_NOISE, readable, relative_noise, share_interval

_RATIOS = ("precision", "recall", "f1")


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
    if not readable(num_units, noise_std):
        return {"not_released": dict.fromkeys(("accuracy", *_RATIOS, "confusion_matrix"), "noise")}
    correct = matrix.diagonal()
    true, predicted = matrix.sum(1), matrix.sum(0)
    of_side, of_both = noise_std * math.sqrt(classes), noise_std * math.sqrt(2.0 * classes + 2.0)
    ratios = {
        "precision": (correct, predicted, of_side),
        "recall": (correct, true, of_side),
        "f1": (2.0 * correct, true + predicted, of_both),
    }
    accuracy = min(1.0, max(0.0, float(correct.sum()) / num_units))
    found: dict[str, Any] = {"not_released": {}}
    if readable(num_units, of_side):
        interval = share_interval(accuracy, num_units, of_side)
        found |= {"accuracy": accuracy, "accuracy_interval_95": interval, "f1_micro": accuracy}
    else:
        found["not_released"]["accuracy"] = "noise"
    _add_over_classes(found, ratios)
    found["confusion_matrix"] = [[round(value, 2) for value in row] for row in matrix.clamp(min=0.0).tolist()]
    return _without_empty(found)


def _add_over_classes(found: dict[str, Any], ratios: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
    """ratios: name → numerators, denominators, (classes,), and the noise on each denominator."""
    for name, (numerator, denominator, std) in ratios.items():
        values, noise = ratio(numerator, denominator), relative_noise(denominator, std)
        if float(noise.mean()) >= MOST_NOISE:
            found["not_released"][name] = "noise"
            continue
        found[f"{name}_macro"] = float(values.mean())
        told = zip(values.tolist(), (noise < MOST_NOISE).tolist(), strict=True)
        found[f"{name}_per_class"] = [value if clear else None for value, clear in told]


def _without_empty(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "not_released" or value}


def card_lines(metrics: Mapping[str, Any]) -> list[str]:
    """For the model card."""
    lines = []
    if "accuracy" in metrics:
        low, high = metrics["accuracy_interval_95"]
        lines.append(f"- accuracy {metrics['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})")
    return [*lines, *_averages(metrics, "macro"), *_loss(metrics)]


def _loss(metrics: Mapping[str, Any]) -> list[str]:
    return [f"- mean cross-entropy {metrics['loss']:.4f} nats"] if "loss" in metrics else []


def _averages(metrics: Mapping[str, Any], kind: str) -> list[str]:
    names = {"f1": f"{kind} F1", "precision": "precision", "recall": "recall"}
    told = [f"{said} {metrics[f'{name}_{kind}']:.4f}" for name, said in names.items() if f"{name}_{kind}" in metrics]
    return [f"- {', '.join(told)}"] if told else []


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
    if not readable(num_units, noise_std):
        return {"not_released": dict.fromkeys(("accuracy", *_RATIOS, "confusion_matrix"), "noise")}
    neither, only_predicted, only_true, both = cells.unbind(1)
    of_side, of_three = noise_std * math.sqrt(2.0), noise_std * math.sqrt(6.0)
    ratios = {
        "precision": (both, both + only_predicted, of_side),
        "recall": (both, both + only_true, of_side),
        "f1": (2.0 * both, 2.0 * both + only_predicted + only_true, of_three),
    }
    accuracy = min(1.0, max(0.0, float((neither + both).sum()) / (num_units * classes)))
    interval = share_interval(accuracy, num_units, noise_std * math.sqrt(2.0 / classes))
    found: dict[str, Any] = {"not_released": {}, "accuracy": accuracy, "accuracy_interval_95": interval}
    for name, (numerator, denominator, std) in ratios.items():
        total = denominator.sum()
        if readable(float(total), std * math.sqrt(classes)):
            found[f"{name}_micro"] = float(ratio(numerator.sum(), total))
        else:
            found["not_released"][f"{name}_micro"] = "noise"
    _add_over_classes(found, ratios)
    found["binary_counts"] = [[round(value, 2) for value in row] for row in cells.clamp(min=0.0).tolist()]
    return _without_empty(found)


def binary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """For the model card."""
    if "accuracy" not in metrics:
        return []
    low, high = metrics["accuracy_interval_95"]
    return [
        f"- right decisions over all classes {metrics['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})",
        *_averages(metrics, "micro"),
        *_averages(metrics, "macro"),
        *_loss(metrics),
    ]
