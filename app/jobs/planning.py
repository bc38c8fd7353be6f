"""From a request to a frozen privacy plan: pure arithmetic on values that were read before; no database, no lock.

The same path answers an estimate and a submit, so an estimate says exactly what a submit would certify.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app.budgets import service as budgets
from app.budgets.service import Charge
from app.budgets.status import remaining_epsilon
from app.catalog.adaptations import adaptation_to_dict
from app.catalog.bases import BaseModel
from app.catalog.recipes import EVALUATION, Recipe, main_part
from app.errors import BudgetExceeded, InvalidRequest
from app.jobs import checkpoints, columns, targets
from app.jobs.facts import Defaults, FileFacts
from app.jobs.requested import Request, plural, recipe_of, with_overrides
from app.jobs.schemas import (
    CreateJob,
    EvaluationBlock,
    TaskBlock,
    hyperparameters_of,
)
from app.jobs.targets import Target
from app.privacy.accountants import pld_epsilon
from app.privacy.calibration import CannotCalibrate, calibrate, gaussian_noise_multiplier
from app.privacy.dp_events import event_for, to_json
from app.privacy.filter import MAX_EPSILON_LIMIT
from app.privacy.plan import Dataset, GaussianRelease, PrivacyPlan

#: Fewer units than this train nothing, and their noise would say so at a cost.
MIN_UNITS = 10

DEFAULT_EPSILON_SHARE = 0.1

#: Plans that are made, at a tenth of a second each, to find one that fits.
_NEAREST_TRIES = 24


@dataclass(frozen=True, slots=True)
class PlannedCharge:
    """A charge, and the datasets of the plan's parts that it covers. epsilon: at most what these parts cost, at the
    target δ, as the request has it."""

    charge: Charge
    datasets: tuple[Dataset, ...]
    epsilon: float

    def to_dict(self) -> dict[str, Any]:
        """As `tables.Job.charges` has it."""
        return {
            "budget_id": self.charge.budget_id,
            "dp_event": dict(self.charge.dp_event),
            "rho": self.charge.rho,
            "datasets": list(self.datasets),
        }


@dataclass(frozen=True, slots=True)
class Planned:
    """What a request came to. resolved, hyperparameters: as in `tables.Job`."""

    plan: PrivacyPlan
    charges: tuple[PlannedCharge, ...]
    resolved: dict[str, Any]
    hyperparameters: dict[str, Any]


def plan(
    body: CreateJob,
    base: BaseModel,
    training: FileFacts,
    validation: FileFacts | None,
    defaults: Defaults,
    by_admin: bool = False,
    compare: Callable[[], None] = lambda: None,
) -> Planned:
    """The plan of a request, admitted as far as can be seen without the budgets' locks.

    by_admin: the request's key may declare values public, see `columns.resolve`. compare: called before declared
    classes are compared with rows; what it raises is the answer.

    Raises InvalidRequest for what can never be, BudgetExceeded (with the nearest plan that fits) for what does not fit.
    """
    reading = columns.resolve(body.task or TaskBlock(), base, training, validation, by_admin, compare)
    evaluation = targets.evaluation_block(body, validation)
    targets.require_mechanism(body, training, validation)
    unit = targets.privacy_unit(body, training, validation, reading.columns)
    num_held_out = 0 if evaluation is None or validation is not None else targets.held_out(evaluation, training)
    num_units = training.units - num_held_out
    if num_units < MIN_UNITS:
        raise InvalidRequest(
            "too_few_rows", f"Training needs at least {MIN_UNITS} {plural(unit)}.", param=training.param
        )
    request = Request(body, base, training, validation, evaluation, reading, unit, num_held_out, num_units)
    if body.privacy.mechanism == "none":
        return _not_private(request)
    target = targets.target(body, training, validation, defaults)
    planned = _private(request, target)
    over = [charge for charge in planned.charges if not _fits(charge, request)]
    if over:
        raise _exceeded(request, target, over[0])
    return planned


def _private(request: Request, target: Target) -> Planned:
    recipe, reasons = recipe_of(request, target.epsilon)
    recipe = with_overrides(request.body, recipe)
    kind = "none" if request.evaluation is None else "public" if request.evaluated.public else "private"
    if kind == "private":
        recipe = dataclasses.replace(recipe, evaluation=_noised_statistics(request, target))
    try:
        calibrated = calibrate(recipe.parts, target.epsilon, target.delta, request.certified)
    except CannotCalibrate as error:
        raise InvalidRequest(
            "epsilon_too_small",
            "At this ε even the parts of fixed noise (centring, evaluation) cost more than all of it.",
            param="privacy.target_epsilon",
        ) from error
    privacy_plan = PrivacyPlan(
        mechanism="dp_sgd",
        num_units=request.num_units,
        parts=calibrated.parts,
        target_epsilon=target.epsilon,
        target_delta=target.delta,
        epsilon=calibrated.epsilon,
        accountant=calibrated.accountant,
        privacy_unit=request.unit,
        num_validation_units=request.num_validation_units,
    )
    return _planned(request, recipe, privacy_plan, kind, reasons, _charges(request, privacy_plan))


def _not_private(request: Request) -> Planned:
    recipe, reasons = recipe_of(request, None)
    privacy_plan = PrivacyPlan(
        mechanism="none",
        num_units=request.num_units,
        parts=recipe.parts(0.0),
        num_validation_units=request.num_validation_units,
    )
    kind = "none" if request.evaluation is None else "public"
    return _planned(request, recipe, privacy_plan, kind, reasons, ())


def _planned(
    request: Request,
    recipe: Recipe,
    privacy_plan: PrivacyPlan,
    evaluation: str,
    reasons: dict[str, str],
    charges: tuple[PlannedCharge, ...],
) -> Planned:
    main = recipe.main
    asked = hyperparameters_of(request.body)
    multiplier = asked.learning_rate_multiplier
    validation = request.validation
    reading = request.reading
    resolved = {
        "base": request.base.to_dict(),
        "task": {
            "type": reading.task.type,
            "columns": dict(reading.columns),
            "labels": list(reading.labels),
            "labels_source": reading.labels_source,
            "max_length": reading.max_length,
            "options": dict(reading.options),
        },
        "adaptation": adaptation_to_dict(main.adaptation),
        "phases": [phase.to_dict() for phase in recipe.phases],
        "evaluation": evaluation,
        "num_rows": request.training.num_rows,
        "num_held_out": request.num_held_out,
        "num_validation_rows": validation.num_rows if validation else 0,
        "training_digest": request.training.rows_digest,
        "validation_digest": validation.rows_digest if validation else None,
        "certified_datasets": list(request.certified),
        "checkpoint_steps": checkpoints.steps(privacy_plan, request.body.checkpoints.count),
        "auto": reasons,
    }
    hyperparameters = {
        "n_epochs": max(1, round(main.num_steps * main.sample_rate)),
        "batch_size": max(1, round(main.sample_rate * request.num_units)),
        "learning_rate_multiplier": 1.0 if multiplier == "auto" else multiplier,
    }
    return Planned(privacy_plan, charges, resolved, hyperparameters)


def _noised_statistics(request: Request, target: Target) -> GaussianRelease:
    """The noise on the sums that all metrics follow from, at the evaluation's share of ε."""
    epsilon = _evaluation_epsilon(request, target.epsilon)
    if request.one_budget and epsilon >= target.epsilon:
        raise InvalidRequest(
            "invalid_evaluation",
            "The evaluation's ε must leave some of the target to training.",
            param="evaluation.epsilon",
        )
    if epsilon > MAX_EPSILON_LIMIT:
        raise InvalidRequest("invalid_evaluation", "The evaluation's ε is too large.", param="evaluation.epsilon")
    return GaussianRelease(
        EVALUATION,
        noise_multiplier=gaussian_noise_multiplier(epsilon, target.delta),
        sensitivity=request.reading.task.sensitivity(len(request.reading.labels), request.reading.options),
        dataset="training" if request.validation is None else "validation",
    )


# --- what it costs ---------------------------------------------------------------------------------------------------


def _charges(request: Request, privacy_plan: PrivacyPlan) -> tuple[PlannedCharge, ...]:
    touched: dict[str, tuple[Dataset, ...]] = {}
    if request.training.budget is not None:
        touched[request.training.budget.id] = request.certified
    validation = request.validation
    if validation is not None and validation.budget is not None and not request.one_budget:
        touched[validation.budget.id] = ("validation",)
    charges = []
    for budget_id, datasets in touched.items():
        budget = request.budget(budget_id)
        event = event_for(privacy_plan, datasets)
        rho = budget.accounting.rho_of(event)
        charge = Charge(budget_id, to_json(event), rho, unit_column=privacy_plan.privacy_unit.column)
        if not budget.accounting.admits(budget.usage.total, rho) and budget.usage.total == 0.0:
            # Only as the first plan on its budget can it be admitted: by PLD, at the budget's own δ.
            charge = dataclasses.replace(charge, first_plan_epsilon=pld_epsilon(event, budget.accounting.delta).epsilon)
        assert privacy_plan.target_epsilon is not None
        epsilon = privacy_plan.target_epsilon
        if datasets == ("validation",):
            epsilon = _evaluation_epsilon(request, epsilon)
        charges.append(PlannedCharge(charge, datasets, epsilon))
    return tuple(charges)


def _evaluation_epsilon(request: Request, target_epsilon: float) -> float:
    block = request.evaluation or EvaluationBlock()
    return block.epsilon or target_epsilon * (block.epsilon_share or DEFAULT_EPSILON_SHARE)


def _fits(planned: PlannedCharge, request: Request) -> bool:
    budget = request.budget(planned.charge.budget_id)
    return budget.open and budgets.admissible(budget.accounting, budget.usage, planned.charge)


def _exceeded(request: Request, target: Target, over: PlannedCharge) -> BudgetExceeded:
    budget = request.budget(over.charge.budget_id)
    if not budget.open:
        return budgets.closed(budget.id)
    nearest = _nearest(request, target, over)
    offer = (
        f" The nearest plan that fits has target_epsilon {nearest['target_epsilon']:g}."
        if nearest is not None
        else " No plan of this kind fits."
    )
    return BudgetExceeded(
        "budget_exceeded",
        "This plan does not fit what is left of the privacy budget." + offer,
        param="privacy.target_epsilon",
        privacy_budget=budget.id,
        epsilon_limit=budget.accounting.epsilon_limit,
        epsilon_remaining=remaining_epsilon(budget.accounting, budget.usage.total),
        nearest_plan=nearest,
    )


def _nearest(request: Request, target: Target, over: PlannedCharge) -> dict[str, float] | None:
    """The largest target ε, to some per cent, whose whole plan fits: found by planning, from just above downwards."""
    epsilon = _two_digits(_just_above(request, target, over))
    for _ in range(_NEAREST_TRIES):
        if epsilon <= 0.0:
            return None
        try:
            candidate = _private(request, dataclasses.replace(target, epsilon=epsilon))
        except InvalidRequest:
            return None
        if all(_fits(charge, request) for charge in candidate.charges):
            main = main_part(candidate.plan.parts)
            return {"target_epsilon": epsilon, "noise_multiplier": main.noise_multiplier}
        epsilon = _two_digits(epsilon * 0.93)
    return None


def _just_above(request: Request, target: Target, over: PlannedCharge) -> float:
    """A target ε that costs a little more than what remains; 0 where no target ε helps."""
    budget = request.budget(over.charge.budget_id)
    remaining = remaining_epsilon(budget.accounting, budget.usage.total)
    if "training" not in over.datasets:
        # Only the evaluation is charged there, a share of the target, or an ε of its own.
        block = request.evaluation or EvaluationBlock()
        if block.epsilon is not None:
            return 0.0
        remaining /= block.epsilon_share or DEFAULT_EPSILON_SHARE
    if budget.usage.total == 0.0:
        return min(target.epsilon, remaining)
    # ε of one mechanism goes about with √ln(1/δ), and `remaining` is at the budget's δ.
    return min(target.epsilon, 1.15 * remaining * math.sqrt(math.log(target.delta) / math.log(budget.accounting.delta)))


def _two_digits(epsilon: float) -> float:
    """Rounded down to two significant digits below 1, to hundredths above."""
    digits = 2 if epsilon >= 1.0 else 1 - math.floor(math.log10(epsilon)) if epsilon > 0.0 else 0
    return math.floor(epsilon * 10**digits) / 10**digits
