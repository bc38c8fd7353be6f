"""The release gate of metrics.json: which of a task's figures may leave the trainer, given how the plan covers them.

An allow list as `worker.reporter` is for the job's history: what is not on it, or not of its kind, is dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import structlog

from app.catalog.tasks import TASKS
from app.privacy import loss_curve
from app.privacy.plan import PrivacyPlan
from worker.reporter import Check, interval, number

log = structlog.get_logger(__name__)


def _vector(value: Any) -> bool:
    return isinstance(value, list) and all(number(entry) for entry in value)


def _shares(value: Any) -> bool:
    """Of classes; null where one cannot be read for noise."""
    return isinstance(value, list) and all(entry is None or number(entry) for entry in value)


def _matrix(value: Any) -> bool:
    return isinstance(value, list) and all(_vector(row) for row in value)


#: Why a metric is named, but not told.
WITHHELD = ("noise", "public_data_only", "no_entities")


def _withheld(value: Any, names: Collection[str]) -> bool:
    return isinstance(value, Mapping) and all(name in names and why in WITHHELD for name, why in value.items())


def _scores(value: Any, names: Collection[str]) -> bool:
    return isinstance(value, Mapping) and all(name in names and number(score) for name, score in value.items())


_CONFUSION: Mapping[str, Check] = {
    "accuracy": number,
    "accuracy_interval_95": _vector,
    "precision_macro": number,
    "recall_macro": number,
    "f1_macro": number,
    "f1_micro": number,
    "precision_per_class": _shares,
    "recall_per_class": _shares,
    "f1_per_class": _shares,
    "confusion_matrix": _matrix,
}
_BINARY: Mapping[str, Check] = {
    **{name: check for name, check in _CONFUSION.items() if name != "confusion_matrix"},
    "precision_micro": number,
    "recall_micro": number,
    "binary_counts": _matrix,
}
_ERRORS: Mapping[str, Check] = {
    "mae": number,
    "mae_interval_95": _vector,
    "rmse": number,
    "rmse_interval_95": _vector,
    "r2": number,
    "correlation": number,
}
_LOSS: Mapping[str, Check] = {
    "loss": number,
    "loss_interval_95": _vector,
    "loss_cut_off_at": number,
    "perplexity": number,
    "perplexity_interval_95": _vector,
    "token_accuracy": number,
    "token_accuracy_interval_95": _vector,
}

#: All that metrics.json may hold of a task's own, beside the class names, which are the job's.
METRICS: dict[str, Mapping[str, Check]] = {
    "text_classification": {**_CONFUSION, **_BINARY},
    "text_regression": _ERRORS,
    "token_classification": _CONFUSION,
    "image_classification": _CONFUSION,
    "language_modeling": _LOSS,
    "masked_lm": _LOSS,
    "chat": _LOSS,
    "instruction": _LOSS,
    "text_to_text": _LOSS,
    "translation": _LOSS,
    "summarization": _LOSS,
}
#: What is let through besides where the data were declared public: exact figures of texts that the model wrote, and of
#: whole entities. Those of each type are checked against the job's own tags.
PUBLIC_METRICS: Mapping[str, Check] = {
    **dict.fromkeys(("bleu", "chrf", "rouge1", "rouge2", "rougeL"), number),
    "generated_rows": number,
    "loss": number,
    **dict.fromkeys(("entity_precision", "entity_recall", "entity_f1"), number),
}

_METHODS = {
    "private": "Gaussian noise on sums over units, charged to the plan; the rest follows from the noised sums",
    "public": "exact, on data declared public",
}


class NotReleased(ValueError):
    """The trainer offers metrics of a kind that the job's plan does not cover."""


#: Of a checkpoint.
NO_METRICS_YET = {"released": "none", "reason": "Metrics are released once, with the finished model."}


def cleared_metrics(
    metrics: Mapping[str, Any], evaluation: str, task_type: str, labels: tuple[str, ...]
) -> dict[str, Any]:
    """What of metrics.json may leave, given how the plan covers it. Raises NotReleased where the two disagree."""
    if metrics.get("released") != evaluation:
        raise NotReleased("metrics of another kind than planned")
    if evaluation == "none":
        return {"released": "none", "reason": "No evaluation was asked for."}
    released: dict[str, Any] = {
        "released": evaluation,
        "method": _METHODS[evaluation],
        "dataset": "validation_file" if metrics.get("dataset") == "validation_file" else "held_out_split",
        "averaged_over": "units" if metrics.get("averaged_over") == "units" else "records",
        **({"labels": list(labels)} if labels else {}),
    }
    kinds: dict[str, Check] = {"num_units": number, "noise_std": number, **METRICS[task_type]}
    task = TASKS[task_type]
    if evaluation == "public":
        own = {*task.public_metrics, "generated_rows"}
        kinds |= {name: kind for name, kind in PUBLIC_METRICS.items() if name in own}
        if "entity_f1_per_type" in own:
            types = {label.partition("-")[2] for label in labels}
            kinds["entity_f1_per_type"] = lambda value: _scores(value, types)
    withheld = {*METRICS[task_type], *task.metrics, *task.public_metrics}
    kinds["not_released"] = lambda value: _withheld(value, withheld)
    for name, kind in kinds.items():
        if name in metrics and kind(metrics[name]):
            released[name] = metrics[name]
    dropped = metrics.keys() - released.keys()
    if dropped:
        log.warning("metrics_dropped", count=len(dropped))
    return released


def cleared_curve(curve: Any, plan: PrivacyPlan, executed: Mapping[str, int]) -> dict[str, Any]:
    """What of metrics.json's loss curve may leave: all of it. Raises NotReleased where it is not the plan's.

    executed: steps of each part behind the weights that it goes with.
    """
    if curve is None:
        return {}

    def sound(told: Any) -> bool:
        if not isinstance(told, Mapping) or not interval(told.get("train_loss_interval_95")):
            return False
        point = {name: value for name, value in told.items() if name != "train_loss_interval_95"}
        return loss_curve.is_point(plan, point, executed, {})

    if not isinstance(curve, list) or not all(map(sound, curve)):
        raise NotReleased("a loss curve that is not the plan's")
    return {"train_loss_curve": curve}
