"""Rows of uploads and of their parts."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Double, ForeignKey, Index, String, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Json

_KEPT = text("erased_at IS NULL")


class Upload(Base):
    """A file to be, from its first part to its completion. Times are Unix seconds of the database's clock.

    bytes: what the parts must come to. privacy_unit: {column}; None: nothing was said. expires_after: of the file, in
    seconds. expires_at: of the upload. erased_at: when the parts of an upload that has ended were gone, rows included.
    joined: which parts were joined last, in their order, as a digest of their ids; md5: what these came to; refusals:
    how often that was not what the upload could be completed with, and tries under way.
    """

    __tablename__ = "uploads"
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'completed', 'cancelled', 'expired')", name="status"),
        CheckConstraint("(status = 'completed') = (file_id IS NOT NULL)", name="file"),
        Index("ix_uploads_project", "project_id", "id"),
        Index("uq_uploads_idempotency", "project_id", "idempotency_key", unique=True),
        Index("ix_uploads_kept", "status", "expires_at", sqlite_where=_KEPT, postgresql_where=_KEPT),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    status: Mapped[str] = mapped_column(String(16))
    filename: Mapped[str] = mapped_column(String(255))
    bytes: Mapped[int] = mapped_column(BigInteger)
    purpose: Mapped[str] = mapped_column(String(32))
    public: Mapped[bool]
    privacy_budget: Mapped[str | None] = mapped_column(String(64))
    privacy_unit: Mapped[dict[str, Any] | None] = mapped_column(Json)
    expires_after: Mapped[int | None]
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    joined: Mapped[str | None] = mapped_column(String(64))
    md5: Mapped[str | None] = mapped_column(String(32))
    refusals: Mapped[int] = mapped_column(default=0)
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    created_at: Mapped[float] = mapped_column(Double)
    expires_at: Mapped[float] = mapped_column(Double)
    erased_at: Mapped[float | None] = mapped_column(Double)


class Part(Base):
    """Bytes of an upload that has not ended, stored."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float] = mapped_column(Double)
