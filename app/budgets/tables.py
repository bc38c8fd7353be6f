"""Rows of budgets. ρ is stored in whole units of 2⁻⁴⁰ (`app.privacy.filter`), so that SQL sums it exactly."""

from __future__ import annotations

from typing import Any

from sqlalchemy import CheckConstraint, Double, ForeignKey, Index, String, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Json


class PrivacyBudget(Base):
    """A limit (ε, δ) over all jobs on the files that are attached to it.

    privacy_unit: {column}; null: of each file its own.
    rdp_order, rho_capacity: the Rényi filter's α, fixed at creation, and its capacity.
    next_sequence, head_hash: where the ledger's chain continues; changed only under the row's lock.
    policy: {max_target_epsilon, max_target_delta}, what a single job may promise at most; None: anything that fits.
    foreign_head: what the store kept of this ledger and the database does not know (`app.budgets.heads`); the budget is
    locked while it stands here. rho_reconciled: what reconciliations charged, for events that nobody knows any more.
    """

    __tablename__ = "privacy_budgets"
    __table_args__ = (
        Index(
            "ix_privacy_budgets_default",
            "project_id",
            unique=True,
            sqlite_where=text("is_default"),
            postgresql_where=text("is_default"),
        ),
        CheckConstraint("status IN ('open', 'closed')", name="status"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(String(200))
    is_default: Mapped[bool] = mapped_column(default=False)
    epsilon_limit: Mapped[float] = mapped_column(Double)
    delta: Mapped[float] = mapped_column(Double)
    neighboring_relation: Mapped[str] = mapped_column(String(32))
    privacy_unit: Mapped[dict[str, Any]] = mapped_column(Json)
    rdp_order: Mapped[int]
    rho_capacity: Mapped[float] = mapped_column(Double)
    status: Mapped[str] = mapped_column(String(16), default="open")
    created_at: Mapped[float] = mapped_column(Double)
    next_sequence: Mapped[int] = mapped_column(default=1)
    head_hash: Mapped[str] = mapped_column(String(64))
    policy: Mapped[dict[str, Any] | None] = mapped_column(Json)
    foreign_head: Mapped[dict[str, Any] | None] = mapped_column(Json)
    rho_reconciled: Mapped[float] = mapped_column(Double, default=0.0)


class Reservation(Base):
    """What one job has taken from one budget: its whole plan until it settles, then what it executed.

    job_id has no foreign key: jobs are a higher slice, and a reservation outlives everything but its budget.
    """

    __tablename__ = "reservations"
    __table_args__ = (
        UniqueConstraint("budget_id", "job_id", name="uq_reservations_budget_job"),
        CheckConstraint("state IN ('reserved', 'settled')", name="state"),
        CheckConstraint("rho >= 0 AND rho_charged >= 0 AND rho_charged <= rho", name="rho"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    budget_id: Mapped[str] = mapped_column(ForeignKey("privacy_budgets.id"))
    job_id: Mapped[str] = mapped_column(String(40), index=True)
    state: Mapped[str] = mapped_column(String(16), default="reserved")
    rho: Mapped[float] = mapped_column(Double)
    rho_charged: Mapped[float] = mapped_column(Double, default=0.0)
    dp_event: Mapped[dict[str, Any]] = mapped_column(Json)
    charged_event: Mapped[dict[str, Any] | None] = mapped_column(Json)
    created_at: Mapped[float] = mapped_column(Double)
    settled_at: Mapped[float | None] = mapped_column(Double)


class LedgerEntry(Base):
    """One link of a budget's append-only chain. DpEvents and ρ, never ε: ε is always derived.

    details: what else the act changed (a limit, the reason for a close). hash: SHA-256 over the canonical JSON of all
    other columns but the id; previous_hash is the hash of the entry before (64 zeros before the first).
    """

    __tablename__ = "ledger_entries"
    __table_args__ = (UniqueConstraint("budget_id", "sequence", name="uq_ledger_entries_budget_sequence"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    budget_id: Mapped[str] = mapped_column(ForeignKey("privacy_budgets.id"))
    sequence: Mapped[int]
    kind: Mapped[str] = mapped_column(String(32))
    job_id: Mapped[str | None] = mapped_column(String(40))
    actor: Mapped[str] = mapped_column(String(64))
    rho: Mapped[float] = mapped_column(Double)
    dp_event: Mapped[dict[str, Any] | None] = mapped_column(Json)
    details: Mapped[dict[str, Any]] = mapped_column(Json)
    created_at: Mapped[float] = mapped_column(Double)
    previous_hash: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))
