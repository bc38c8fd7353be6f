"""What the supervisor asks of the trainer: the job folder's `spec.json`. Frozen, free of torch.

The folder:
    spec.json                      this value (the plan is inside it, verbatim as stored with the job)
    base/                          the base model, where it does not lie in a package
    data/training.parquet          the rows, in file order; data/validation.parquet where there is a validation file
    resume/                        the last committed checkpoint, where there is one
    checkpoints/<global step>/     what the trainer writes; the supervisor commits or deletes it
    taken/<global step>/results/   the bundle of a checkpoint that is to be published, laid out as the final one
    results/model/                 the bundle; results/metrics.json
    control.sock                   the supervisor listens, the trainer connects (messages.py)
    trainer.log                    standard error; never leaves the folder
    ranks-*                        where several ranks meet
The job's secret key comes as the first line of standard input, in hexadecimal, never in a file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app.catalog.recipes import Phase
from app.privacy.plan import PrivacyPlan

#: How metrics leave: noised and charged, exact on data declared public, or not at all.
Evaluation = Literal["private", "public", "none"]

SPEC_FILE, SOCKET_FILE, LOG_FILE = "spec.json", "control.sock", "trainer.log"
TRAINING_FILE, VALIDATION_FILE = "data/training.parquet", "data/validation.parquet"
BASE_FOLDER, RESUME_FOLDER, CHECKPOINTS_FOLDER = "base", "resume", "checkpoints"
MODEL_FOLDER, METRICS_FILE = "results/model", "results/metrics.json"
TAKEN_FOLDER = "taken"


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """columns: role → column name in the Parquet file. labels: class names in the order of the model's outputs; none
    where the task has no classes. options: what the task takes besides, as the request's `task` block has it."""

    type: str
    columns: Mapping[str, str]
    labels: tuple[str, ...]
    max_length: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def class_index(self) -> dict[str, int]:
        """The output of each class, by its text in the rows: its name, or, where `label_ids` says so, its number."""
        by_number = bool(self.options.get("label_ids"))
        return {str(place) if by_number else name: place for place, name in enumerate(self.labels)}


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """path: a folder with config.json, model.safetensors and a tokenizer, already checked against its digest.

    licence: as the catalog has it. lineage: of a base that this server trained, [{model, job, epsilon, delta, …}] of
    the jobs that made it, the last one first, as `app.models.lineage` has it.
    """

    id: str
    family: str
    path: str
    licence: str = "other"
    lineage: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class DataSpec:
    """num_rows, num_validation_rows: what the Parquet files must hold. num_held_out: units of the training file
    kept for evaluation by the keyed split (0 with a validation file, or without evaluation). Which column makes the
    units, how many there are, and how many rows of one a step takes, the plan says."""

    num_rows: int
    num_held_out: int
    has_validation_file: bool
    num_validation_rows: int = 0


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """Speed and memory only, frozen on the job at its first attempt; never privacy.

    max_physical_batch_tokens: tokens, padding included, that one forward pass takes; 0: measured at the start.
    threads: 0 leaves torch's own choice, shared among the ranks.
    ranks: processes that train together; 0: one for each GPU, one on a CPU.
    """

    device: str = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    max_physical_batch_tokens: int = 0
    threads: int = 0
    ranks: int = 0


@dataclass(frozen=True, slots=True)
class TrainerSpec:
    """One attempt at one job.

    dataset_digest: SHA-256 of the training rows; with the plan's digest it binds checkpoints to what they were made of.
    published_steps: after these steps (counted over all parts) the checkpoint becomes a bundle as well.
    seed: the wire's seed; it drives only public initialisation (a new head), never sampling or noise.
    """

    job_id: str
    task: TaskSpec
    base: BaseSpec
    phases: tuple[Phase, ...]
    plan: PrivacyPlan
    data: DataSpec
    evaluation: Evaluation
    dataset_digest: str
    seed: int = 0
    runtime: RuntimeOptions = dataclasses.field(default_factory=RuntimeOptions)
    checkpoint_seconds: float = 60.0
    published_steps: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` gives the same value back."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "task": {**dataclasses.asdict(self.task), "labels": list(self.task.labels)},
            "base": {**dataclasses.asdict(self.base), "lineage": [dict(entry) for entry in self.base.lineage]},
            "phases": [phase.to_dict() for phase in self.phases],
            "plan": self.plan.to_dict(),
            "data": dataclasses.asdict(self.data),
            "runtime": dataclasses.asdict(self.runtime),
            "published_steps": list(self.published_steps),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainerSpec:
        """Raises KeyError, TypeError or ValueError on anything that `to_dict` did not write."""
        return cls(
            **{
                **data,
                "task": TaskSpec(**{**data["task"], "labels": tuple(data["task"]["labels"])}),
                "base": BaseSpec(**{**data["base"], "lineage": tuple(data["base"].get("lineage", ()))}),
                "phases": tuple(Phase.from_dict(phase) for phase in data["phases"]),
                "plan": PrivacyPlan.from_dict(data["plan"]),
                "data": DataSpec(**data["data"]),
                "runtime": RuntimeOptions(**data["runtime"]),
                "published_steps": tuple(data["published_steps"]),
            }
        )

    def write(self, folder: Path) -> None:
        """Writes spec.json into an existing job folder."""
        (folder / SPEC_FILE).write_text(json.dumps(self.to_dict()), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> TrainerSpec:
        """Reads spec.json from a job folder."""
        return cls.from_dict(json.loads((folder / SPEC_FILE).read_text(encoding="utf-8")))
