"""Jobs as their users have them: found, rendered, cancelled. Submitting is in `submission`, a worker's side in
`lifecycle`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.auth.service import Caller
from app.db.base import now
from app.errors import Conflict, NotFound
from app.events import service as events
from app.exports import service as exports
from app.jobs import repository, settlement, views
from app.jobs.tables import TERMINAL, Job


def get(session: Session, project_id: str, job_id: str) -> Job:
    """The project's job of that id; NotFound without one."""
    job = repository.find(session, project_id, job_id)
    if job is None:
        raise NotFound("job")
    return job


def ended(session: Session, project_id: str, job_id: str) -> bool:
    """Whether nothing will happen to the job any more."""
    return get(session, project_id, job_id).status in TERMINAL


def render(session: Session, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """The jobs on the wire."""
    positions = repository.queue_positions(session, [job.id for job in jobs if job.status == "queued"])
    made = exports.of_jobs(session, [job.id for job in jobs if job.status == "succeeded"])
    current = session.scalars(select(now())).one()
    return [
        views.render(job, now=current, queue_position=positions.get(job.id), exports=made.get(job.id, ()))
        for job in jobs
    ]


def cancel(session: Session, caller: Caller, job_id: str) -> Job:
    """Ends a waiting job at once; asks the worker of a running one to stop, which it sees within a heartbeat.

    Executed steps are charged, the rest of the reservation returns. Cancelling twice changes nothing; Conflict
    (job_ended) for a job that succeeded or failed.
    """
    job = repository.lock(session, caller.project_id, job_id)
    if job is None:
        raise NotFound("job")
    if job.status in ("succeeded", "failed"):
        raise Conflict("job_ended", "The job has ended and cannot be cancelled.")
    if job.status == "running" and not job.cancel_requested:
        job.cancel_requested = True
        session.flush()
        events.record(
            session,
            project_id=job.project_id,
            job_id=job.id,
            code="cancel_requested",
            message="The job was asked to stop.",
        )
    elif job.status in ("validating_files", "queued"):
        # An attempt that vanished may have executed any of the steps.
        executed = None if job.interrupted else (job.progress or {}).get("executed", {})
        settlement.settle(session, job, "cancelled", executed=executed, actor=caller.key_id)
    return job
