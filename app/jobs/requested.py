"""What a request comes to before ε is: its files, reading and units; and, for an ε, what is to be trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from app.catalog.bases import BaseModel
from app.catalog.families import FAMILIES
from app.catalog.recipes import Recipe, recipe_for
from app.errors import InvalidRequest
from app.jobs import adapting, columns, targets
from app.jobs.facts import BudgetFacts, FileFacts
from app.jobs.schemas import (
    CreateJob,
    EvaluationBlock,
    adaptation_of,
    hyperparameters_of,
    hyperparameters_param,
)
from app.privacy.plan import Dataset, PrivacyUnit

MAX_STEPS = 200_000


@dataclass(frozen=True, slots=True)
class Request:
    """What is fixed before ε is."""

    body: CreateJob
    base: BaseModel
    training: FileFacts
    validation: FileFacts | None
    evaluation: EvaluationBlock | None
    reading: columns.Reading
    unit: PrivacyUnit
    num_held_out: int
    num_units: int

    @property
    def evaluated(self) -> FileFacts:
        """The file whose rows the metrics come from."""
        return self.validation or self.training

    @property
    def num_validation_units(self) -> int:
        """Units that the metrics come from."""
        return self.num_held_out if self.validation is None else self.validation.units

    @property
    def one_budget(self) -> bool:
        """Whether training and validation rows are charged together."""
        if self.validation is None:
            return True
        mine, other = self.training.budget, self.validation.budget
        return mine is not None and other is not None and mine.id == other.id

    @property
    def certified(self) -> tuple[Dataset, ...]:
        """The datasets whose parts the job's own ε covers."""
        return ("training", "validation") if self.validation is not None and self.one_budget else ("training",)

    def budget(self, budget_id: str) -> BudgetFacts:
        """The budget of that id, of the one or two that the job touches."""
        for file in (self.training, self.validation):
            if file is not None and file.budget is not None and file.budget.id == budget_id:
                return file.budget
        raise KeyError(budget_id)


def recipe_of(request: Request, target_epsilon: float | None) -> tuple[Recipe, dict[str, str]]:
    """What is trained, and why that where the request leaves it open. Raises InvalidRequest."""
    asked = hyperparameters_of(request.body)
    batch_size = None if asked.batch_size == "auto" else asked.batch_size
    if batch_size is not None and batch_size > request.num_units:
        raise InvalidRequest(
            "invalid_hyperparameter",
            f"batch_size is larger than the {request.num_units} {plural(request.unit)} to train on.",
            param=f"{hyperparameters_param(request.body)}.batch_size",
        )
    task, adaptation = request.reading.task, adaptation_of(request.body)
    family = FAMILIES[request.base.family]
    if adaptation is not None:
        adapting.require(adaptation, task, request.base)
    recipe, reason = recipe_for(
        task.type,
        adaptation,
        request.num_units,
        target_epsilon,
        n_epochs=None if asked.n_epochs == "auto" else asked.n_epochs,
        batch_size=batch_size,
        learning_rate_multiplier=None if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier,
        centred=family.centred and not request.base.continues(task.type, request.reading.labels),
        width=1 if family.centred else request.base.hidden_size,
        lora=family.lora,
        attentive=family.attentive,
        pairs="text_pair" in request.reading.columns,
        multi_label=bool(request.reading.options.get("multi_label")),
        clipping=request.body.privacy.clipping,
        num_layers=request.base.num_layers,
        layer_parameters=request.base.layer_parameters,
        pools=request.base.pools,
        as_measured=request.body.optimizer is None and request.body.schedule is None,
    )
    if sum(phase.num_steps for phase in recipe.phases) > MAX_STEPS:
        raise InvalidRequest(
            "too_many_steps",
            f"A job has at most {MAX_STEPS} steps: take a larger batch_size or fewer n_epochs.",
            param=hyperparameters_param(request.body),
        )
    bound = targets.loss_bound(request.body, request.reading.task.type, len(request.reading.labels))
    main = targets.optimized(request.body, recipe.main)
    phases = tuple(main if phase.name == main.name else phase for phase in recipe.phases)
    return dataclasses.replace(recipe, phases=phases, loss_bound=bound), {"adaptation": reason}


def with_overrides(body: CreateJob, recipe: Recipe) -> Recipe:
    """With the clipping that the request asks for. Raises InvalidRequest `invalid_max_grad_norm`."""
    clipping = body.privacy.clipping or recipe.clipping
    norm = body.privacy.max_grad_norm
    if norm is not None and clipping == "automatic" and norm != 1.0:
        raise InvalidRequest(
            "invalid_max_grad_norm",
            "Automatic clipping scales every gradient to norm 1; give `clipping: flat` with another norm.",
            param="privacy.max_grad_norm",
        )
    if clipping == "automatic":
        norm = 1.0
    return dataclasses.replace(recipe, clipping=clipping, max_grad_norm=norm or recipe.max_grad_norm)


def plural(unit: PrivacyUnit) -> str:
    """What the privacy units are called."""
    return "rows" if unit.column is None else "privacy units"
