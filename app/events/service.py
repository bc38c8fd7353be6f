"""Writing a job's history."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.base import now
from app.events import repository
from app.events.tables import JobEvent
from app.ids import new_id

Level = Literal["info", "warn", "error"]
Type = Literal["message", "metrics"]


def record(
    session: Session,
    *,
    project_id: str,
    job_id: str,
    code: str,
    message: str,
    level: Level = "info",
    type: Type = "message",
    data: dict[str, Any] | None = None,
) -> JobEvent:
    """Adds an event to the job's history, in the caller's transaction.

    code and message are fixed texts of ours, data holds released numbers: nothing of a private row.
    Write or lock the job's row first: the event holds a lock of its own until the commit.
    """
    event = JobEvent(
        id=new_id("ftevent"),
        project_id=project_id,
        job_id=job_id,
        sequence=repository.next_sequence(session, job_id),
        created_at=session.scalars(select(now())).one(),
        level=level,
        type=type,
        code=code,
        message=message,
        data=data,
    )
    session.add(event)
    session.flush()
    return event
