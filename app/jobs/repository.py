"""Queries of jobs. What a project may not see is not in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Select, func, select, update
from sqlalchemy.orm import Session

from app.db.base import now
from app.jobs.tables import TERMINAL, Job

#: Of this many ended jobs one sweep removes what they left.
ERASE_JOBS = 100


def readable(project_id: str) -> Select[Job]:
    """The project's jobs."""
    return select(Job).where(Job.project_id == project_id)


def with_metadata(session: Session, statement: Select[Job], metadata: Mapping[str, str]) -> Select[Job]:
    """Those whose metadata has each of these pairs, whatever characters are in them."""
    each = func.jsonb_each_text if session.get_bind().dialect.name == "postgresql" else func.json_each
    for key, value in metadata.items():
        pair = each(Job.job_metadata).table_valued("key", "value")
        statement = statement.where(select(pair.c.key).where(pair.c.key == key, pair.c.value == value).exists())
    return statement


def find(session: Session, project_id: str, job_id: str) -> Job | None:
    """The project's job of that id."""
    return session.scalars(readable(project_id).where(Job.id == job_id)).one_or_none()


def lock(session: Session, project_id: str, job_id: str) -> Job | None:
    """The row under its lock, as it is now."""
    statement = readable(project_id).where(Job.id == job_id).with_for_update(key_share=True)
    return session.scalars(statement.execution_options(populate_existing=True)).one_or_none()


def find_by_key(session: Session, project_id: str, idempotency_key: str) -> Job | None:
    """The job that this `Idempotency-Key` made."""
    statement = readable(project_id).where(Job.idempotency_key == idempotency_key)
    return session.scalars(statement).one_or_none()


def queue_positions(session: Session, job_ids: Sequence[str]) -> dict[str, int]:
    """Place in the queue, from 1, of those of the jobs that wait in it."""
    if not job_ids:
        return {}
    ranked = (
        select(Job.id, func.row_number().over(order_by=(Job.queued_at, Job.id)).label("position"))
        .where(Job.status == "queued")
        .subquery()
    )
    rows = session.execute(select(ranked.c.id, ranked.c.position).where(ranked.c.id.in_(job_ids)))
    return {row.id: row.position for row in rows}


def queue_length(session: Session) -> int:
    """How many jobs wait."""
    return session.scalars(select(func.count()).select_from(Job).where(Job.status == "queued")).one()


def waiting_for_files(session: Session) -> Sequence[str]:
    """Jobs that cannot be planned before their files are read, oldest first."""
    return session.scalars(select(Job.id).where(Job.status == "validating_files").order_by(Job.id)).all()


def ended(session: Session, seconds: float) -> list[tuple[str, str, list[str]]]:
    """(project_id, job_id, its files' ids) of jobs that ended longer ago than that and may have left something; some at
    a time."""
    rows = session.execute(
        select(Job.project_id, Job.id, Job.training_file_id, Job.validation_file_id)
        .where(Job.status.in_(TERMINAL), Job.erased_at.is_(None), Job.finished_at < now() - seconds)
        .order_by(Job.finished_at, Job.id)
        .limit(ERASE_JOBS)
    )
    return [
        (row.project_id, row.id, [id for id in (row.training_file_id, row.validation_file_id) if id is not None])
        for row in rows
    ]


def note_erased(session: Session, job_ids: Sequence[str]) -> None:
    """What these ended jobs had left is gone."""
    session.execute(update(Job).where(Job.id.in_(job_ids), Job.status.in_(TERMINAL)).values(erased_at=now()))
