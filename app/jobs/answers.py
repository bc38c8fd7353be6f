"""The shapes of what is answered about jobs, for the documentation; `views`, `estimates`, `checkpoints` make them.

Tests hold real answers against them. Fields with a default are left out where there is nothing to say.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from app.events.schemas import JobEventOut
from app.exports.schemas import ExportBlock, ExportOut
from app.jobs.schemas import AdaptationBlock


class Resolved(BaseModel):
    """The wire's three, as `auto` or the request has settled them. batch_size: expected; a step's own is drawn."""

    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: float | Literal["auto"]


class ResolvedSupervised(BaseModel):
    """The same once more, where the wire has it."""

    hyperparameters: Resolved


class ResolvedMethod(BaseModel):
    """Always supervised."""

    type: Literal["supervised"]
    supervised: ResolvedSupervised


class JobError(BaseModel):
    """Why a job failed: a fixed code, and never a text from the run."""

    code: str
    message: str
    param: str | None


class JobProgress(BaseModel):
    """step, num_steps: over all parts of the plan, releases of statistics included. phase: the latest that trained.
    executed: steps of each part."""

    step: int
    num_steps: int
    phase: str | None
    executed: dict[str, int]


class JobTask(BaseModel):
    """What is trained, named or inferred. columns: role → column. labels_source: `declared`, `file` (then stated as
    public) or `none`. max_length: in tokens. options: the task's own, such as range, multi_label or source_prefix."""

    type: str
    columns: dict[str, str]
    labels: list[str]
    labels_source: Literal["declared", "file", "none"]
    max_length: int
    options: dict[str, Any]


class EstimatedTask(JobTask):
    """Classes taken from the file are told by the job that states them as public: here only how many there are."""

    labels: list[str] = Field(default_factory=list)
    num_labels: int


class Auto(BaseModel):
    """adaptation: why it is this one. `requested`; `few_units`: a head, for nothing else was measured above it at so
    few, or nothing that does not take hours; `small_epsilon`: a head, for more would drown in the noise;
    `little_noise`: LoRA behind such a head; `many_units`: enough for weights of the body; `pretrained_head`: the task
    trains the base's own head."""

    adaptation: Literal["requested", "few_units", "small_epsilon", "little_noise", "many_units", "pretrained_head"]


class JobSchedule(BaseModel):
    """Of the main phase's learning rates."""

    type: str
    warmup_steps: int


class JobOptimizer(BaseModel):
    """Of the main phase. learning_rate: of the weights that it adapts; head_learning_rate: of a new head."""

    type: str
    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    momentum: float | None
    schedule: JobSchedule


class JobEvaluation(BaseModel):
    """metrics: `private` (with noise, charged), `public` (exact) or `none`. units: that they are computed on. Counts of
    rows are null where a unit is a person: they are private then."""

    metrics: Literal["private", "public", "none"]
    units: int
    held_out_rows: int | None
    validation_rows: int | None


class JobLossCurve(BaseModel):
    """Of the main phase. bound: where a unit's loss is clipped; num_points: how many points will be told."""

    bound: float
    noise_std_per_step: float
    num_points: int


class UnitOut(BaseModel):
    """Whose presence is protected: all records with one value in that column; null: each record."""

    column: str | None


class PlanPrivacy(BaseModel):
    """A private plan. epsilon: certified for all of it, at target_delta. noise_multiplier to clipping: of the main
    phase; num_steps: its steps (a job's progress counts those of all parts). parts: everything that is noised.
    privacy_budgets: that are charged, the training file's first."""

    mechanism: Literal["dp_sgd", "none"]
    target_epsilon: float | None = None
    target_delta: float | None = None
    epsilon: float | None = None
    accountant: str | None = None
    noise_multiplier: float | None = None
    sample_rate: float | None = None
    num_steps: int | None = None
    max_grad_norm: float | None = None
    clipping: str | None = None
    loss_curve: JobLossCurve | None = None
    num_units: int | None = None
    privacy_unit: UnitOut | None = None
    max_records_per_unit: int | None = None
    neighboring_relation: str | None = None
    parts: list[dict[str, Any]] = Field(default_factory=list)
    privacy_budget: str | None = None
    privacy_budgets: list[str] = Field(default_factory=list)


class JobPrivacy(PlanPrivacy):
    """epsilon_spent: of the steps executed so far, or of the whole plan once charged_in_full says so (a failed job, or
    one cancelled after a crash); by epsilon_spent_accountant. epsilon_reserved: held until the job ends."""

    epsilon_reserved: float | None = None
    epsilon_spent: float | None = None
    epsilon_spent_accountant: str | None = None
    charged_in_full: bool | None = None


class JobOut(BaseModel):
    """The wire's `fine_tuning.job`; ours from queue_position on. Times are Unix seconds.

    task to checkpoint_steps, hyperparameters as numbers and progress: once the files are read. organization_id: the
    project. result_files, integrations: always empty; trained_tokens: never told. queue_position: 1 is the next.
    attempts: how often a worker began. adaptation: with the options of its type spelt out; `targets` of LoRA are empty
    where the family chose. checkpoint_steps: after which a checkpoint is published. exports: of the job's `export`, and
    those asked for later.
    """

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    cancel_requested: bool
    model: str
    fine_tuned_model: str | None
    organization_id: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    hyperparameters: Resolved
    method: ResolvedMethod
    integrations: list[Any]
    metadata: dict[str, str]
    user_provided_suffix: str | None
    error: JobError | None
    queue_position: int | None
    progress: JobProgress | None
    attempts: int
    task: JobTask | None
    adaptation: AdaptationBlock | None
    auto: Auto | None
    optimizer: JobOptimizer | None
    evaluation: JobEvaluation | None
    checkpoint_steps: list[int] | None
    export: ExportBlock | None
    exports: list[ExportOut]
    privacy: JobPrivacy


class JobList(BaseModel):
    """A page of jobs."""

    object: Literal["list"]
    data: list[JobOut]
    has_more: bool


class BudgetAfter(BaseModel):
    """What the plan would leave of a budget it is charged to: the largest ε that one more plan could have."""

    privacy_budget: str
    epsilon_limit: float
    epsilon_remaining: float
    epsilon_remaining_after: float


class NearestPlan(BaseModel):
    """The same request with this target_epsilon would fit."""

    target_epsilon: float
    noise_multiplier: float


class EstimateError(BaseModel):
    """The error that a submit would be answered with. epsilon_remaining: of the budget that it does not fit."""

    code: str
    message: str
    type: str
    param: str | None
    privacy_budget: str | None = None
    epsilon_limit: float | None = None
    epsilon_remaining: float | None = None


class EstimateOut(BaseModel):
    """What a submit would come to. feasible: whether it fits its budgets; where it does not, only error and
    nearest_plan are told. num_steps: over all parts of the plan. memory_bytes, seconds: not estimated, always null
    (`GET /v1/base_models` has a base's memory, and with `task` rough seconds)."""

    object: Literal["fine_tuning.job.estimate"]
    feasible: bool
    privacy: PlanPrivacy | None = None
    num_steps: int | None = None
    hyperparameters: Resolved | None = None
    task: EstimatedTask | None = None
    adaptation: AdaptationBlock | None = None
    auto: Auto | None = None
    evaluation: Literal["private", "public", "none"] | None = None
    checkpoint_steps: list[int] | None = None
    budgets: list[BudgetAfter] | None = None
    queue_position: int | None = None
    memory_bytes: int | None = None
    seconds: float | None = None
    error: EstimateError | None
    nearest_plan: NearestPlan | None


class EventList(BaseModel):
    """A page of events."""

    object: Literal["list"]
    data: list[JobEventOut]
    has_more: bool


class CheckpointMetrics(BaseModel):
    """The last point of the training loss until there, where one was told."""

    step: int
    train_loss: float | None = None
    train_loss_noise_std: float | None = None
    train_loss_interval_95: list[float] | None = None


class CheckpointOut(BaseModel):
    """The wire's `fine_tuning.job.checkpoint`. epsilon_spent: certified for the steps until there, at delta."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics
    epsilon_spent: float | None
    delta: float | None
    accountant: str | None


class CheckpointList(BaseModel):
    """A page of checkpoints."""

    object: Literal["list"]
    data: list[CheckpointOut]
    has_more: bool
