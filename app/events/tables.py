"""Rows of job history."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Json


class JobEvent(Base):
    """One thing that happened to a job, in words and numbers that may be shown.

    `job_id` is no foreign key: this slice stands below jobs, and knows no table of theirs.
    """

    __tablename__ = "job_events"
    __table_args__ = (Index("ix_job_events_job_id_sequence", "job_id", "sequence", unique=True),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    job_id: Mapped[str] = mapped_column(String(64))
    sequence: Mapped[int]
    """1, 2, … within the job, in the order of the commits."""
    created_at: Mapped[float]
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(16))
    code: Mapped[str] = mapped_column(String(64))
    message: Mapped[str] = mapped_column(String(512))
    data: Mapped[dict[str, Any] | None] = mapped_column(Json)
