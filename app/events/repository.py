"""Statements over job events."""

from __future__ import annotations

from sqlalchemy import Select, func, select, text
from sqlalchemy.orm import Session

from app.events.tables import JobEvent


def readable(project_id: str, job_id: str) -> Select[JobEvent]:
    """The events of one job, as its project may read them."""
    return select(JobEvent).where(JobEvent.project_id == project_id, JobEvent.job_id == job_id)


def after(session: Session, project_id: str, job_id: str, sequence: int, limit: int) -> list[JobEvent]:
    """Up to `limit` events that follow this sequence number, oldest first."""
    statement = readable(project_id, job_id).where(JobEvent.sequence > sequence)
    return list(session.scalars(statement.order_by(JobEvent.sequence).limit(limit)))


def find_sequence(session: Session, project_id: str, job_id: str, event_id: str) -> int | None:
    """The sequence number of this event, if it is one of this job's."""
    return session.scalar(
        readable(project_id, job_id).with_only_columns(JobEvent.sequence).where(JobEvent.id == event_id)
    )


def next_sequence(session: Session, job_id: str) -> int:
    """The next free number of this job, held until the end of the transaction.

    The lock makes numbers visible in their order: a reader who has seen 7 will never find a 6 appear. SQLite has one
    writer at a time anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:job_id, 0))"), {"job_id": job_id})
    last = session.scalar(select(func.max(JobEvent.sequence)).where(JobEvent.job_id == job_id))
    return (last or 0) + 1
