"""A job event on the wire."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from app.events.tables import JobEvent


class JobEventOut(BaseModel):
    """`fine_tuning.job.event`; `code` is ours."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    code: str
    message: str
    data: dict[str, Any] | None = None


def render(event: JobEvent) -> JobEventOut:
    """The event as the wire has it."""
    return JobEventOut(
        id=event.id,
        created_at=int(event.created_at),
        level=event.level,
        type=event.type,
        code=event.code,
        message=event.message,
        data=event.data,
    )
