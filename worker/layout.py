"""A job's folder as its trainer finds it: the rows, the checkpoint to resume from, the base, and their spec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from app.catalog.recipes import Phase
from app.db.session import Database
from app.errors import ApiError
from app.files import service as files
from app.files.tables import File
from app.jobs.lifecycle import Claimed
from app.models import service as models
from app.privacy.plan import PrivacyPlan, SampledGaussian
from app.storage import Storage
from worker import base_model, job_folder, leftovers
from worker.trainer.spec import (
    RESUME_FOLDER,
    TRAINING_FILE,
    VALIDATION_FILE,
    BaseSpec,
    DataSpec,
    RuntimeOptions,
    TaskSpec,
    TrainerSpec,
)
from worker.workplace import Workplace

log = structlog.get_logger(__name__)


class Unworkable(Exception):
    """The job cannot go on; the text is the code of `jobs.failures` that its user reads."""


class NotBegun(Unworkable):
    """And its trainer has not looked at a row: why it cannot go on depends on none."""


def lay_out(workplace: Workplace, claimed: Claimed, folder: Path, runtime: RuntimeOptions) -> TrainerSpec:
    """Fills the folder, and clears the store of what earlier attempts left; returns the spec in it. The rows wait
    beside it for `give_rows`.

    Raises NotBegun (data_mismatch, resume_mismatch, base_model_invalid), Unworkable (resume_mismatch) where steps that
    the database has forgotten were told, and what database and store raise.
    """
    storage, resolved = workplace.storage, claimed.resolved
    training, validation = _files(workplace.database, claimed)
    kept_back = job_folder.kept_back_from(folder)
    kept_back.mkdir(mode=0o700)
    _fetch_rows(storage, training.rows_key, resolved["training_digest"], kept_back / TRAINING_FILE)
    if validation is not None:
        _fetch_rows(storage, validation.rows_key, resolved["validation_digest"], kept_back / VALIDATION_FILE)
    # A published checkpoint is in the ledger, which the store has the head of; points of the loss curve are not.
    if _tells_losses(claimed.plan) and leftovers.forgotten(storage, claimed):
        raise Unworkable("resume_mismatch")
    leftovers.clear(storage, claimed)
    _fetch_checkpoint(storage, claimed, folder)
    spec = TrainerSpec(
        job_id=claimed.job_id,
        task=_task(resolved["task"]),
        base=_base(workplace, claimed, folder),
        phases=tuple(Phase.from_dict(phase) for phase in resolved["phases"]),
        plan=claimed.plan,
        data=DataSpec(
            num_rows=resolved["num_rows"],
            num_held_out=resolved["num_held_out"],
            has_validation_file=validation is not None,
            num_validation_rows=resolved.get("num_validation_rows") or 0,
        ),
        evaluation=resolved["evaluation"],
        dataset_digest=resolved["training_digest"],
        seed=claimed.seed,
        runtime=runtime,
        checkpoint_seconds=workplace.settings.checkpoint_seconds,
        published_steps=tuple(resolved.get("checkpoint_steps", ())),
    )
    spec.write(folder)
    return spec


def give_rows(folder: Path) -> None:
    """Puts the rows into the folder. Raises OSError."""
    data = Path(TRAINING_FILE).parent
    (job_folder.kept_back_from(folder) / data).rename(folder / data)


def _tells_losses(plan: PrivacyPlan) -> bool:
    return any(isinstance(part, SampledGaussian) and part.loss is not None for part in plan.parts)


def _files(database: Database, claimed: Claimed) -> tuple[File, File | None]:
    with database.reading() as session:
        try:
            training = files.get(session, claimed.project_id, claimed.training_file_id)
            if claimed.validation_file_id is None:
                return training, None
            return training, files.get(session, claimed.project_id, claimed.validation_file_id)
        except ApiError:  # deleted: no attempt will find it again
            raise NotBegun("data_mismatch") from None


def _fetch_rows(storage: Storage, key: str | None, digest: str, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    if key is None:
        raise NotBegun("data_mismatch")
    storage.get_file(key, path)
    if job_folder.sha256(path) != digest:
        raise NotBegun("data_mismatch")


def _fetch_checkpoint(storage: Storage, claimed: Claimed, folder: Path) -> None:
    checkpoint = claimed.checkpoint
    if checkpoint is not None:
        try:
            job_folder.get_folder(storage, checkpoint["key"], checkpoint["files"], folder / RESUME_FOLDER)
        except job_folder.DamagedCheckpoint:
            raise NotBegun("resume_mismatch") from None


def _base(workplace: Workplace, claimed: Claimed, folder: Path) -> BaseSpec:
    try:
        return base_model.lay_out(workplace, claimed, folder)
    except models.BaseModelUnavailable:
        log.exception("base_model_refused")
        raise NotBegun("base_model_invalid") from None


def _task(task: Mapping[str, Any]) -> TaskSpec:
    return TaskSpec(
        type=task["type"],
        columns=task["columns"],
        labels=tuple(task["labels"]),
        max_length=task["max_length"],
        options=task.get("options") or {},
    )
