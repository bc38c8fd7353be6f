"""What attempts keep in the store, and its removal: checkpoints and bundles that nothing in the database points to.

A worker that is killed between storing a checkpoint and committing it leaves one behind. Steps that are executed again
draw the same noise: two checkpoints of one step that differ, in rounding or in a damaged copy, would tell more than one
noised sum. So they go unseen, before the next attempt makes a step, and at the latest soon after the job has ended.
"""

from __future__ import annotations

import structlog
from obstore.exceptions import BaseError as StoreError

from app.files import truncation
from app.jobs import repository as jobs
from app.jobs.lifecycle import Claimed
from app.models import service as models
from app.storage.interface import Storage
from worker.workplace import Workplace

log = structlog.get_logger(__name__)


def attempts_prefix(project_id: str, job_id: str) -> str:
    """Above all that the attempts at a job keep for the next one."""
    return f"projects/{project_id}/jobs/{job_id}"


def checkpoint_key(claimed: Claimed, step: int) -> str:
    """Of this attempt's checkpoint at a step: no other attempt writes there."""
    return f"{attempts_prefix(claimed.project_id, claimed.job_id)}/{claimed.fence}/checkpoints/{step}"


def bundles_prefix(project_id: str, job_id: str) -> str:
    """Above the bundles of all attempts at a job: of its model and of its checkpoints, published or not."""
    return f"projects/{project_id}/models/{job_id}"


def bundle_prefix(claimed: Claimed, step: int | None = None) -> str:
    """Of this attempt's bundle, or of its checkpoint's at a step: beside each other, so that each is deleted alone."""
    name = str(claimed.fence) if step is None else f"{claimed.fence}-step-{step}"
    return f"{bundles_prefix(claimed.project_id, claimed.job_id)}/{name}"


def clear(storage: Storage, claimed: Claimed) -> None:
    """At a claim: removes what earlier attempts left, but for the checkpoint to resume from and what was published."""
    kept = [claimed.checkpoint["key"]] if claimed.checkpoint is not None else []
    storage.delete_prefix(attempts_prefix(claimed.project_id, claimed.job_id), keep=kept)
    storage.delete_prefix(bundles_prefix(claimed.project_id, claimed.job_id), keep=claimed.published)


def delete_attempts(storage: Storage, claimed: Claimed) -> None:
    """Of a job that has ended: its checkpoints are of no more use. What a failure here leaves, the sweep removes."""
    try:
        storage.delete_prefix(attempts_prefix(claimed.project_id, claimed.job_id))
    except (OSError, StoreError):
        log.exception("checkpoints_not_deleted")


def forgotten(storage: Storage, claimed: Claimed) -> bool:
    """Whether the store has checkpoints of this claim or of later ones: then the database was put back to a backup from
    before them, and what their steps told may be known."""
    fences = storage.names(attempts_prefix(claimed.project_id, claimed.job_id))
    return any(fence.isdigit() and int(fence) >= claimed.fence for fence in fences)


def erase(workplace: Workplace) -> None:
    """For the sweep: removes, once, all that jobs left which have ended for a lease's time, but for published models
    and the committed figures of what they cut.

    By then a worker that lost such a job has noticed. What fails is tried again by the next sweep.
    """
    with workplace.database.reading() as session:
        ended = jobs.ended(session, workplace.settings.lease_seconds)
        published = {job_id: models.stored_by(session, job_id) for _, job_id, _ in ended}
        told = {
            (job_id, file_id): truncation.to_keep(session, project_id, file_id, job_id)
            for project_id, job_id, file_ids in ended
            for file_id in file_ids
        }
    erased = []
    for project_id, job_id, file_ids in ended:
        try:
            workplace.storage.delete_prefix(attempts_prefix(project_id, job_id))
            workplace.storage.delete_prefix(bundles_prefix(project_id, job_id), keep=published[job_id])
            for file_id in file_ids:
                truncation.erase_rest(workplace.storage, project_id, file_id, job_id, told[job_id, file_id])
        except (OSError, StoreError):
            log.exception("leftovers_not_erased", job_id=job_id)
        else:
            erased.append(job_id)
    if erased:
        with workplace.database.writing() as session:
            jobs.note_erased(session, erased)
