"""Rows of files. A deleted file keeps its row: what was private once stays so, and its budget stays known."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Double, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Json


class File(Base):
    """An upload, from its bytes to its canonical rows. Times are Unix seconds of the database's clock.

    sha256: of the bytes as uploaded. rows_digest: of the canonical rows (Parquet), what jobs are bound to.
    budget_id: what jobs on these rows are charged to; None for files declared public.
    unit_column: whose equal values make one privacy unit; None: each record is one, or the file is public.
    num_units: public by declaration. records_per_unit: [[records, units, rows]], see `app.files.reader`, and private.
    used_at: when a job first held it: from then on its bytes keep their unit.
    columns: [{name, type, distinct, classes, lists, list_items, elements, chat, range, nulls}], see
      `app.files.profile`; in the service only, since all but names and types comes from private rows.
    label_lists: digests of the lists of classes that keys without the scope admin declared for its rows.
    error: {code, message, line, column, row}. source_key, rows_key: in the storage.
    bytes_read: how far the reader is, of `bytes`.
    attempts, claimed_until: of the processing; a claim that ran out is another attempt's.
    erased_at: when the bytes of a deleted file were gone.
    """

    __tablename__ = "files"
    __table_args__ = (
        UniqueConstraint("project_id", "idempotency_key", name="uq_files_idempotency"),
        CheckConstraint("status IN ('uploaded', 'processed', 'error')", name="status"),
        CheckConstraint("public = (budget_id IS NULL)", name="budget"),
        Index("ix_files_project", "project_id", "id"),
        Index("ix_files_digest", "project_id", "sha256"),
        Index("ix_files_status", "status"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    budget_id: Mapped[str | None] = mapped_column(ForeignKey("privacy_budgets.id"))
    filename: Mapped[str] = mapped_column(String(255))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    purpose: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(16))
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    public: Mapped[bool]
    format: Mapped[str | None] = mapped_column(String(16))
    num_rows: Mapped[int | None] = mapped_column(BigInteger)
    unit_column: Mapped[str | None] = mapped_column(String(64))
    num_units: Mapped[int | None] = mapped_column(BigInteger)
    records_per_unit: Mapped[list[list[int]] | None] = mapped_column(Json)
    rows_digest: Mapped[str | None] = mapped_column(String(64))
    columns: Mapped[list[dict[str, Any]] | None] = mapped_column(Json)
    label_lists: Mapped[list[str] | None] = mapped_column(Json)
    source_key: Mapped[str] = mapped_column(String(255))
    rows_key: Mapped[str | None] = mapped_column(String(255))
    bytes_read: Mapped[int] = mapped_column(BigInteger, default=0)
    attempts: Mapped[int] = mapped_column(default=0)
    claimed_until: Mapped[float | None] = mapped_column(Double)
    created_at: Mapped[float] = mapped_column(Double)
    used_at: Mapped[float | None] = mapped_column(Double)
    expires_at: Mapped[float | None] = mapped_column(Double)
    deleted_at: Mapped[float | None] = mapped_column(Double)
    erased_at: Mapped[float | None] = mapped_column(Double)
    idempotency_key: Mapped[str | None] = mapped_column(String(255))


class FileTruncation(Base):
    """Which attempt's figures of what a job cut of a file are told; these are in the storage, see
    `app.files.truncation`. dataset: `training` or `validation`, what the file was to the job."""

    __tablename__ = "file_truncations"

    file_id: Mapped[str] = mapped_column(ForeignKey("files.id"), primary_key=True)
    job_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    dataset: Mapped[str] = mapped_column(String(16), primary_key=True)
    fence: Mapped[int]


class FileUse(Base):
    """A job that still needs a file. job_id has no foreign key: jobs are a higher slice."""

    __tablename__ = "file_uses"

    file_id: Mapped[str] = mapped_column(ForeignKey("files.id"), primary_key=True)
    job_id: Mapped[str] = mapped_column(String(40), primary_key=True, index=True)
