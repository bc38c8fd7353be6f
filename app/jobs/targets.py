"""What a request asks of privacy and evaluation, with the defaults filled in; refused where it makes no sense."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from app.catalog import recipes
from app.catalog.recipes import Phase
from app.errors import InvalidRequest
from app.files.limits import DEFAULT_RECORDS_PER_UNIT
from app.jobs.facts import Defaults, FileFacts
from app.jobs.schemas import CreateJob, EvaluationBlock, hyperparameters_of
from app.privacy.accountants import MIN_DELTA
from app.privacy.filter import MAX_EPSILON_LIMIT
from app.privacy.plan import PrivacyUnit

DEFAULT_SPLIT = 0.1


@dataclass(frozen=True, slots=True)
class Target:
    """What the job promises: training, and the evaluation on the same budget's rows, together."""

    epsilon: float
    delta: float


def evaluation_block(body: CreateJob, validation: FileFacts | None) -> EvaluationBlock | None:
    """None: nothing is evaluated."""
    if body.evaluation == "none":
        if validation is not None:
            raise InvalidRequest(
                "invalid_evaluation", "A validation file is there to be evaluated on.", param="evaluation"
            )
        return None
    block = body.evaluation or EvaluationBlock()
    if validation is not None and block.split is not None:
        raise InvalidRequest(
            "invalid_evaluation", "Give a validation file or a split, not both.", param="evaluation.split"
        )
    if block.epsilon is not None and block.epsilon_share is not None:
        raise InvalidRequest(
            "invalid_evaluation", "Give epsilon or epsilon_share, not both.", param="evaluation.epsilon"
        )
    return block


def held_out(block: EvaluationBlock, training: FileFacts) -> int:
    """Privacy units of the training file that the keyed split keeps for evaluation."""
    return max(1, math.floor(training.units * (block.split or DEFAULT_SPLIT)))


def privacy_unit(
    body: CreateJob, training: FileFacts, validation: FileFacts | None, columns: Mapping[str, str]
) -> PrivacyUnit:
    """The unit that the files were uploaded with: a job may repeat it, never change it.

    columns: role → name, as the task reads them. Raises InvalidRequest: privacy_unit_mismatch, unit_column_in_task.
    """
    column = training.unit_column
    asked = body.privacy.privacy_unit
    if asked is not None and asked.column != column:
        raise InvalidRequest(
            "privacy_unit_mismatch",
            "A job's privacy unit is the one that its training file was uploaded with.",
            param="privacy.privacy_unit",
        )
    if validation is not None and not validation.public and validation.unit_column != column:
        raise InvalidRequest(
            "privacy_unit_mismatch",
            "The validation file was uploaded with another privacy unit than the training file.",
            param=validation.param,
        )
    most = body.privacy.max_records_per_unit
    if column is None:
        if most is not None:
            raise InvalidRequest(
                "invalid_request",
                "Each record is its own privacy unit here: there is nothing to bound.",
                param="privacy.max_records_per_unit",
            )
        return PrivacyUnit()
    if column in columns.values():
        # As classes, the people's own names would be published.
        raise InvalidRequest(
            "unit_column_in_task", "The privacy unit's column is not one that a model may read.", param="task.columns"
        )
    return PrivacyUnit(column, most or DEFAULT_RECORDS_PER_UNIT)


def require_mechanism(body: CreateJob, training: FileFacts, validation: FileFacts | None) -> None:
    """Raises InvalidRequest where private rows would be read without a mechanism."""
    if body.privacy.mechanism != "none":
        return
    for file in (training, validation):
        if file is not None and not file.public:
            raise InvalidRequest(
                "mechanism_not_allowed",
                "Only files that were declared public are read without a privacy mechanism.",
                param="privacy.mechanism" if file is training else file.param,
            )
    if body.privacy.model_fields_set - {"mechanism", "loss_curve", "loss_bound"}:
        raise InvalidRequest(
            "invalid_request",
            "Without a mechanism there is nothing else to say under `privacy` but what the loss curve is.",
            param="privacy",
        )


def loss_bound(body: CreateJob, task_type: str, num_classes: int) -> float | None:
    """Where the loss curve clips a unit's loss; None: no curve was wanted."""
    if body.privacy.loss_curve:
        return body.privacy.loss_bound or recipes.loss_bound(task_type, num_classes)
    if body.privacy.loss_bound is not None:
        raise InvalidRequest("invalid_request", "Without a loss curve no loss is clipped.", param="privacy.loss_bound")
    return None


def optimized(body: CreateJob, phase: Phase) -> Phase:
    """The phase with the optimizer and the schedule that were asked for. Raises InvalidRequest."""
    if body.optimizer is not None:
        asked = body.optimizer
        if asked.momentum is not None and asked.type != "sgd":
            raise InvalidRequest("invalid_optimizer", "Only `sgd` has a momentum.", param="optimizer.momentum")
        if asked.type == "sgd" and asked.learning_rate is None:
            raise InvalidRequest(
                "invalid_optimizer",
                "`sgd` needs a learning_rate: the recipes' own are AdamW's.",
                param="optimizer.learning_rate",
            )
        if asked.learning_rate is not None:
            if hyperparameters_of(body).learning_rate_multiplier != "auto":
                raise InvalidRequest(
                    "invalid_optimizer",
                    "Give a learning rate or a multiple of the recipe's, not both.",
                    param="optimizer.learning_rate",
                )
            rate = asked.learning_rate
            phase = dataclasses.replace(phase, learning_rate=rate, head_learning_rate=rate)
        momentum = phase.momentum if asked.momentum is None else asked.momentum
        phase = dataclasses.replace(phase, optimizer=asked.type, weight_decay=asked.weight_decay, momentum=momentum)
    if body.schedule is not None:
        if body.schedule.warmup_steps >= phase.num_steps:
            raise InvalidRequest(
                "invalid_schedule",
                f"The warm-up must be shorter than the {phase.num_steps} steps of training.",
                param="schedule.warmup_steps",
            )
        schedule, warmup = body.schedule.type, body.schedule.warmup_steps
        phase = dataclasses.replace(phase, schedule=schedule, num_warmup_steps=warmup)
    return phase


def target(body: CreateJob, training: FileFacts, validation: FileFacts | None, defaults: Defaults) -> Target:
    """Raises InvalidRequest: invalid_epsilon, delta_too_small, delta_too_large."""
    epsilon = defaults.epsilon if body.privacy.target_epsilon is None else body.privacy.target_epsilon
    delta = defaults.delta if body.privacy.target_delta is None else body.privacy.target_delta
    if not 0.0 < epsilon <= MAX_EPSILON_LIMIT:
        raise InvalidRequest(
            "invalid_epsilon",
            f"target_epsilon must be above 0 and at most {MAX_EPSILON_LIMIT:g}.",
            param="privacy.target_epsilon",
        )
    if delta < MIN_DELTA:
        raise InvalidRequest(
            "delta_too_small",
            f"target_delta must be at least {MIN_DELTA:g}: less cannot be certified.",
            param="privacy.target_delta",
        )
    private = [file.units for file in (training, validation) if file is not None and not file.public]
    smallest = min(private, default=training.units)
    if delta * smallest >= 1.0:
        raise InvalidRequest(
            "delta_too_large",
            f"target_delta must be below 1/{smallest}, one over the number of privacy units: a larger one would allow "
            "publishing all of somebody's rows.",
            param="privacy.target_delta",
        )
    return Target(epsilon, delta)
