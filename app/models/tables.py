"""Rows of fine-tuned models."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Double, ForeignKey, Index, String, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Json


class Model(Base):
    """What a job released. A deleted model keeps its row; its bytes are gone.

    job_id has no foreign key: jobs are a higher slice. base: id of the base model.
    step_number: steps over all parts of the plan behind a checkpoint's weights; None: the job's finished model.
    files: [{path, bytes, sha256, crc32}], in the order of the archives. archives: {format: {bytes, sha256}}, of the
      whole archive. base_facts: `BaseModel.to_dict` of it as the base of another job, and `parameter_names`;
      None where it cannot be one.
    erased_at: when the bytes of a deleted model were gone.
    """

    __tablename__ = "models"
    __table_args__ = (
        Index("ix_models_project", "project_id", "created_at"),
        Index(
            "ix_models_finished",
            "job_id",
            unique=True,
            sqlite_where=text("step_number IS NULL"),
            postgresql_where=text("step_number IS NULL"),
        ),
        UniqueConstraint("job_id", "step_number", name="uq_models_job_step"),
    )

    id: Mapped[str] = mapped_column(String(96), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    job_id: Mapped[str] = mapped_column(String(40))
    step_number: Mapped[int | None]
    base: Mapped[str] = mapped_column(String(200))
    storage_prefix: Mapped[str] = mapped_column(String(255))
    files: Mapped[list[dict[str, Any]]] = mapped_column(Json)
    archives: Mapped[dict[str, Any]] = mapped_column(Json)
    metrics: Mapped[dict[str, Any]] = mapped_column(Json)
    privacy_report: Mapped[dict[str, Any]] = mapped_column(Json)
    base_facts: Mapped[dict[str, Any] | None] = mapped_column(Json)
    created_at: Mapped[float] = mapped_column(Double)
    deleted_at: Mapped[float | None] = mapped_column(Double)
    erased_at: Mapped[float | None] = mapped_column(Double)


class ModelUse(Base):
    """A job that starts from a fine-tuned model, and still needs it. job_id has no foreign key, see `Model`."""

    __tablename__ = "model_uses"

    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True)
    job_id: Mapped[str] = mapped_column(String(40), primary_key=True, index=True)
