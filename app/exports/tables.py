"""Rows of exports. The database is the truth: a status changes only under the row's fence."""

from __future__ import annotations

from typing import Any

from sqlalchemy import CheckConstraint, Double, ForeignKey, Index, String, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Json

_THERE = text("deleted_at IS NULL")


class Export(Base):
    """A model in one form. A model has one export of a form at a time; a deleted one keeps its row.

    options: {student: {training_file, columns, num_layers, n_epochs}}, as resolved. fence, attempts: as of a job.
    storage_prefix, files, archives: as of a model; metrics: size, speed and agreement, once it has succeeded.
    erased_at: when all that the attempts at a failed or deleted export had stored was gone.
    """

    __tablename__ = "exports"
    __table_args__ = (
        CheckConstraint("status IN ('queued', 'running', 'succeeded', 'failed')", name="status"),
        Index(
            "uq_exports_model_format", "model_id", "format", unique=True, sqlite_where=_THERE, postgresql_where=_THERE
        ),
        Index("ix_exports_status", "status", "id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    format: Mapped[str] = mapped_column(String(32))
    options: Mapped[dict[str, Any]] = mapped_column(Json)
    status: Mapped[str] = mapped_column(String(16))
    fence: Mapped[int] = mapped_column(default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None] = mapped_column(String(200))
    lease_expires_at: Mapped[float | None] = mapped_column(Double)
    hinted_at: Mapped[float | None] = mapped_column(Double)
    storage_prefix: Mapped[str | None] = mapped_column(String(255))
    files: Mapped[list[dict[str, Any]] | None] = mapped_column(Json)
    archives: Mapped[dict[str, Any] | None] = mapped_column(Json)
    metrics: Mapped[dict[str, Any] | None] = mapped_column(Json)
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    created_at: Mapped[float] = mapped_column(Double)
    started_at: Mapped[float | None] = mapped_column(Double)
    finished_at: Mapped[float | None] = mapped_column(Double)
    deleted_at: Mapped[float | None] = mapped_column(Double)
    erased_at: Mapped[float | None] = mapped_column(Double)
