"""Rows of jobs. The database is the truth: a status changes only here, and only under the row's fence."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Double, ForeignKey, Index, LargeBinary, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Json

#: A status that never changes again.
TERMINAL = ("succeeded", "failed", "cancelled")


class Job(Base):
    """A request to fine-tune, from submit to settlement. Times are Unix seconds of the database's clock.

    request: the body as the user sent it; request_digest: of its canonical JSON, for `Idempotency-Key`.
    resolved: what the request came to: {task: {type, columns, labels, labels_source, max_length}, phases, evaluation,
      num_rows, num_validation_rows, num_held_out, training_digest, validation_digest, adaptation, auto,
      checkpoint_steps, base}, the last as `BaseModel.to_dict` has it: its digests pin the files.
    plan: the frozen `PrivacyPlan`; plan_digest: of it. charges: [{budget_id, dp_event, rho, datasets}].
    hyperparameters: the wire's three numbers as resolved (as requested until then).
    fence: rises with each claim; every write of a worker names the one it was given. attempts: claims so far.
    rows_withheld: the fence of the claim whose trainer has not been given the rows; where it is another's than `fence`,
      or none, the attempt may have read them.
    interrupted: an attempt ended without saying which steps it had executed, and no checkpoint has reached that far
      since; of a job that ended, that it was charged in full whatever it had executed.
    progress: {step, num_steps, phase, executed, at, fence, first_step, first_at, crashed_at, allowed}, the last two the
      furthest step that an attempt which crashed, and the one that runs, may have executed; checkpoint: {key, step,
      executed, files, fence}.
    executed: steps of each part, as far as is known, of a job that ended.
    runtime: `RuntimeOptions`, frozen at the first attempt, as they came out on its machine.
    erased_at: when all that the attempts of an ended job left in the store was gone.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("project_id", "idempotency_key", name="uq_jobs_idempotency"),
        CheckConstraint(
            "status IN ('validating_files', 'queued', 'running', 'succeeded', 'failed', 'cancelled')", name="status"
        ),
        Index("ix_jobs_queue", "status", "queued_at", "id"),
        Index("ix_jobs_project", "project_id", "id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    key_id: Mapped[str] = mapped_column(String(40))
    status: Mapped[str] = mapped_column(String(32))
    model: Mapped[str] = mapped_column(String(200))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int] = mapped_column(BigInteger)
    job_metadata: Mapped[dict[str, str]] = mapped_column("metadata", Json)
    training_file_id: Mapped[str] = mapped_column(ForeignKey("files.id"))
    validation_file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))

    request: Mapped[dict[str, Any]] = mapped_column(Json)
    request_digest: Mapped[str] = mapped_column(String(64))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    resolved: Mapped[dict[str, Any] | None] = mapped_column(Json)
    plan: Mapped[dict[str, Any] | None] = mapped_column(Json)
    plan_digest: Mapped[str | None] = mapped_column(String(64))
    charges: Mapped[list[dict[str, Any]]] = mapped_column(Json, default=list)
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(Json)

    fence: Mapped[int] = mapped_column(default=0)
    rows_withheld: Mapped[int | None]
    attempts: Mapped[int] = mapped_column(default=0)
    lease_expires_at: Mapped[float | None] = mapped_column(Double)
    worker: Mapped[str | None] = mapped_column(String(200))
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    interrupted: Mapped[bool] = mapped_column(default=False)
    progress: Mapped[dict[str, Any] | None] = mapped_column(Json)
    checkpoint: Mapped[dict[str, Any] | None] = mapped_column(Json)
    runtime: Mapped[dict[str, Any] | None] = mapped_column(Json)

    executed: Mapped[dict[str, int] | None] = mapped_column(Json)
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    fine_tuned_model: Mapped[str | None] = mapped_column(String(128))

    created_at: Mapped[float] = mapped_column(Double)
    queued_at: Mapped[float | None] = mapped_column(Double)
    hinted_at: Mapped[float | None] = mapped_column(Double)
    started_at: Mapped[float | None] = mapped_column(Double)
    finished_at: Mapped[float | None] = mapped_column(Double)
    erased_at: Mapped[float | None] = mapped_column(Double)


class JobKey(Base):
    """The job's secret key, wrapped; in a row of its own that is erased at settlement."""

    __tablename__ = "job_keys"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    wrapped: Mapped[bytes] = mapped_column(LargeBinary)
