"""What one attempt at a job stores, and commits under its fence: checkpoints, bundles, figures for the data's owner.

Everything lies in the store before the transaction that points to it, under names of the attempt's own, and goes again
where the fence turns out to be stale.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.files import truncation
from app.jobs import lifecycle
from app.jobs.lifecycle import Claimed, LeaseLost
from worker import job_folder, leftovers, reporter, results
from worker.layout import Unworkable
from worker.trainer.messages import Checkpoint, Finished, Truncation
from worker.trainer.spec import CHECKPOINTS_FOLDER, TAKEN_FOLDER, RuntimeOptions, TrainerSpec
from worker.trainer_process import BadMessage
from worker.workplace import Workplace


@dataclasses.dataclass(frozen=True, slots=True)
class AttemptStore:
    """folder: the job's, where the trainer leaves what is stored here."""

    workplace: Workplace
    claimed: Claimed
    folder: Path
    spec: TrainerSpec

    def keep_truncation(self, message: Truncation) -> None:
        """Beside the owner's report of the file: exact figures, which nothing else of the job may hold.

        Raises LeaseLost; BadMessage where the job has no such file.
        """
        claimed, task, storage = self.claimed, self.spec.task, self.workplace.storage
        file_id = {"training": claimed.training_file_id, "validation": claimed.validation_file_id}[message.dataset]
        if file_id is None:
            raise BadMessage("a validation file that the job has not")
        figures = {
            **dataclasses.asdict(message),
            "model": claimed.model,
            "task": task.type,
            "max_length": task.max_length,
            "max_target_length": task.options.get("max_target_length"),
        }
        of_job, seconds = (claimed.project_id, file_id, claimed.job_id), self.workplace.settings.lease_seconds
        truncation.store(storage, *of_job, claimed.fence, figures)
        try:
            with self.workplace.database.writing() as session:
                lifecycle.heartbeat(session, claimed.job_id, claimed.fence, seconds)
                before = truncation.commit(session, file_id, claimed.job_id, message.dataset, claimed.fence)
        except LeaseLost:
            truncation.drop(storage, *of_job, claimed.fence, message.dataset)
            raise
        if before is not None and before != claimed.fence:
            truncation.drop(storage, *of_job, before, message.dataset)

    def commit_checkpoint(self, message: Checkpoint, runtime: RuntimeOptions) -> None:
        """Stores a checkpoint, moves the job's pointer to it under the fence, deletes the one before.

        Only then, and in that same transaction, is the training loss of its steps told: none of them will run again.
        One that the job was to publish appears as a model in the same transaction: it is the resume point from then on.
        Raises LeaseLost; Unworkable where the trainer's results are no bundle.
        """
        claimed, storage, step, executed = self.claimed, self.workplace.storage, message.step, message.executed
        local = self.folder / CHECKPOINTS_FOLDER / str(step)
        key = leftovers.checkpoint_key(claimed, step)
        digests = job_folder.put_folder(storage, key, local)
        checkpoint = {"key": key, "step": step, "executed": dict(executed), "files": digests}
        published = step in self.spec.published_steps
        taken = self.folder / TAKEN_FOLDER / str(step)
        prefix = leftovers.bundle_prefix(claimed, step)
        fields = self._store_bundle(prefix, taken, executed, runtime, checkpoint=True) if published else None
        try:
            with self.workplace.database.writing() as session:
                previous = lifecycle.commit_checkpoint(session, claimed.job_id, claimed.fence, checkpoint, fields)
                known = {} if previous is None else previous["executed"]
                reporter.record_losses(session, claimed, message.losses, known)
                reporter.record(session, claimed, "checkpoint_committed", {"step": step})
        except LeaseLost:
            storage.delete_prefix(key)
            storage.delete_prefix(prefix)
            raise
        shutil.rmtree(local)
        shutil.rmtree(taken, ignore_errors=True)
        if previous is not None:
            storage.delete_prefix(previous["key"])

    def store_model(self, finished: Finished, runtime: RuntimeOptions) -> dict[str, Any]:
        """Stores the bundle under the fence's own prefix, for `publish`. Raises Unworkable where they are no bundle."""
        prefix = leftovers.bundle_prefix(self.claimed)
        return self._store_bundle(prefix, self.folder, finished.executed, runtime)

    def publish(self, finished: Finished, fields: Mapping[str, Any]) -> str:
        """Publishes the bundle and settles the job, in one transaction; the model's id. Raises LeaseLost."""
        claimed, workplace = self.claimed, self.workplace
        try:
            with workplace.database.writing() as session:
                return lifecycle.succeed(session, claimed.job_id, claimed.fence, finished.executed, fields)
        except LeaseLost:
            workplace.storage.delete_prefix(leftovers.bundle_prefix(claimed))
            raise

    def _store_bundle(
        self,
        prefix: str,
        folder: Path,
        executed: Mapping[str, int],
        runtime: RuntimeOptions,
        *,
        checkpoint: bool = False,
    ) -> dict[str, Any]:
        """Completes what the trainer laid out below `folder` and stores it; the fields of `models.service.publish`."""
        claimed, workplace = self.claimed, self.workplace
        with workplace.database.reading() as session:
            positions = results.ledger_positions(session, claimed)
        spec, keys = dataclasses.replace(self.spec, runtime=runtime), workplace.report_keys
        try:
            bundle = results.build(claimed, spec, executed, positions, folder, keys, checkpoint=checkpoint)
        except results.IncompleteResults:
            raise Unworkable("trainer_error") from None
        return results.store(workplace.storage, prefix, bundle)
