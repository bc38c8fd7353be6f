"""Models, bases, tasks and bundles on the wire."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from app.catalog import bases, tasks
from app.catalog.memory import training_bytes_by_adaptation
from app.catalog.recommendation import Recommendation
from app.models.tables import Model


class ModelOut(BaseModel):
    """The wire's `model`; ours after `owned_by`, of which a base has none.

    step_number: of a checkpoint; null of a finished model.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    base_model: str | None = None
    job: str | None = None
    step_number: int | None = None
    metrics: dict[str, Any] | None = None
    privacy_report: dict[str, Any] | None = None


class ModelList(BaseModel):
    """All models: bases first, then the project's own, newest first."""

    object: Literal["list"] = "list"
    data: list[ModelOut]
    has_more: Literal[False] = False


class SigningKey(BaseModel):
    """The public half of what signs privacy reports, 64 hexadecimal digits."""

    object: Literal["privacy.signing_key"] = "privacy.signing_key"
    algorithm: Literal["Ed25519"] = "Ed25519"
    public_key: str


class ModelDeleted(BaseModel):
    """The wire's answer to a delete."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class ModelFile(BaseModel):
    """A file of a bundle; its SHA-256 is its ETag, too."""

    object: Literal["model.file"] = "model.file"
    path: str
    bytes: int
    sha256: str


class ModelFileList(BaseModel):
    """Everything in a bundle, and the archives that it can be downloaded as."""

    object: Literal["list"] = "list"
    data: list[ModelFile]
    has_more: Literal[False] = False
    archives: dict[str, Any]


class RecommendationOut(BaseModel):
    """Why a base stands where it does. rank: from 1. adaptation: what `auto` would pick. seconds: a rough estimate."""

    rank: int
    reason: str
    adaptation: str
    seconds: float


class Ancestor(BaseModel):
    """A job that a fine-tuned base comes from, and what it promised its own rows."""

    model: str
    job: str | None
    base_model: str | None
    mechanism: str | None
    privacy_unit: Any = None
    epsilon: float | None
    delta: float | None


class BaseModelOut(BaseModel):
    """A pretrained model that jobs start from.

    training_memory_bytes: by adaptation, estimated from the numbers of parameters, see docs/recipes.md.
    source: `package`, `folder`, `hub`, or `fine_tuned`: then `lineage` has the jobs that made it, the last one first.
    languages: that a translation can ask for by their codes. language_pair: from which into which it translates, where
    it knows no others.
    """

    id: str
    object: Literal["base_model"] = "base_model"
    title: str
    family: str
    tasks: list[str]
    parameters: int
    hidden_size: int
    num_layers: int
    max_length: int
    licence: str
    sha256: str | None
    source: str
    languages: list[str]
    language_pair: list[str] | None
    training_memory_bytes: dict[str, int]
    lineage: list[Ancestor]
    recommendation: RecommendationOut | None = None


class BaseModelList(BaseModel):
    """A page of the catalog of bases."""

    object: Literal["list"] = "list"
    data: list[BaseModelOut]
    has_more: bool


class TaskColumn(BaseModel):
    """A role that the task reads. names: the column names that it is inferred from, the first one present."""

    role: str
    names: list[str]
    required: bool


class TaskOut(BaseModel):
    """What can be trained. options: keys of a job's `task` block that this one takes, beside columns, labels and
    max_length (in tokens, unless a job says another). metrics: what an evaluation releases, with noise on private rows;
    public_metrics: what one on data declared public adds."""

    type: str
    object: Literal["task"] = "task"
    title: str
    labelled: bool
    columns: list[TaskColumn]
    options: list[str]
    max_length: int
    metrics: list[str]
    public_metrics: list[str]


class TaskList(BaseModel):
    """The catalog of tasks."""

    object: Literal["list"] = "list"
    data: list[TaskOut]
    has_more: Literal[False] = False


def render(model: Model, *, full: bool = False) -> ModelOut:
    """A fine-tuned model; `full` with its metrics and its privacy report."""
    return ModelOut(
        id=model.id,
        created=int(model.created_at),
        owned_by=model.project_id,
        base_model=model.base,
        job=model.job_id,
        step_number=model.step_number,
        metrics=model.metrics if full else None,
        privacy_report=model.privacy_report if full else None,
    )


def render_as_model(base_id: str) -> ModelOut:
    """A base among the models. The wire wants a time, a base has none."""
    return ModelOut(id=base_id, created=0, owned_by="catalog")


def render_base(base: bases.BaseModel, batch_tokens: int, recommendation: Recommendation | None = None) -> BaseModelOut:
    """A base in the catalog. batch_tokens: of this server's physical batches."""
    return BaseModelOut(
        id=base.id,
        title=base.title,
        family=base.family,
        tasks=list(base.tasks),
        parameters=base.parameters,
        hidden_size=base.hidden_size,
        num_layers=base.num_layers,
        max_length=base.max_length,
        licence=base.licence,
        sha256=base.digest or None,
        source=base.source,
        languages=list(base.languages),
        language_pair=list(base.language_pair) or None,
        training_memory_bytes=training_bytes_by_adaptation(base, batch_tokens),
        lineage=[Ancestor.model_validate(entry) for entry in base.lineage],
        recommendation=None
        if recommendation is None
        else RecommendationOut(
            rank=recommendation.rank,
            reason=recommendation.reason,
            adaptation=recommendation.adaptation,
            seconds=float(f"{recommendation.seconds:.2g}"),
        ),
    )


def render_task(task: tasks.Task) -> TaskOut:
    """A task in the catalog."""
    columns = [TaskColumn(role=c.role, names=list(c.names), required=c.required) for c in task.columns]
    return TaskOut(
        type=task.type,
        title=task.title,
        labelled=task.labelled,
        columns=columns,
        options=list(task.options),
        max_length=task.max_length,
        metrics=list(task.metrics),
        public_metrics=list(task.public_metrics),
    )
