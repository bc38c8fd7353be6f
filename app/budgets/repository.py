"""Queries of budgets. What a project may not see is not in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Select, case, func, select
from sqlalchemy.orm import Session

from app.budgets.tables import LedgerEntry, PrivacyBudget, Reservation


@dataclass(frozen=True, slots=True)
class Usage:
    """ρ in whole units: what settled jobs were charged, and what unsettled ones hold."""

    charged: float
    reserved: float

    @property
    def total(self) -> float:
        """What counts against the capacity."""
        return self.charged + self.reserved


def readable(project_id: str) -> Select[PrivacyBudget]:
    """The project's budgets."""
    return select(PrivacyBudget).where(PrivacyBudget.project_id == project_id)


def find(session: Session, project_id: str, budget_id: str) -> PrivacyBudget | None:
    """The project's budget of that id."""
    return session.scalars(readable(project_id).where(PrivacyBudget.id == budget_id)).one_or_none()


def find_default(session: Session, project_id: str) -> PrivacyBudget | None:
    """The project's own budget."""
    return session.scalars(readable(project_id).where(PrivacyBudget.is_default)).one_or_none()


def lock(session: Session, budget_id: str) -> PrivacyBudget | None:
    """The row, under its lock, as it is now (SQLite's writers hold the whole database already)."""
    statement = (
        select(PrivacyBudget)
        .where(PrivacyBudget.id == budget_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )
    return session.scalars(statement).one_or_none()


def usage(session: Session, budget_id: str) -> Usage:
    """Sums over the budget's reservations: exact, since each ρ is a whole number of units."""
    reserved = Reservation.state == "reserved"
    row = session.execute(
        select(
            func.coalesce(func.sum(case((reserved, 0.0), else_=Reservation.rho_charged)), 0.0),
            func.coalesce(func.sum(case((reserved, Reservation.rho), else_=0.0)), 0.0),
        ).where(Reservation.budget_id == budget_id)
    ).one()
    return Usage(charged=float(row[0]), reserved=float(row[1]))


def unsettled(session: Session, job_id: str) -> Sequence[Reservation]:
    """What the job still holds, in the order in which its budgets are locked."""
    return session.scalars(
        select(Reservation)
        .where(Reservation.job_id == job_id, Reservation.state == "reserved")
        .order_by(Reservation.budget_id)
        .execution_options(populate_existing=True)
    ).all()


def counted(session: Session, budget_id: str) -> Sequence[Reservation]:
    """Reservations that count against the capacity, oldest first."""
    return session.scalars(
        select(Reservation)
        .where(Reservation.budget_id == budget_id, (Reservation.state == "reserved") | (Reservation.rho_charged > 0.0))
        .order_by(Reservation.id)
    ).all()


def entries(budget_id: str) -> Select[LedgerEntry]:
    """The ledger of a budget that the caller may see."""
    return select(LedgerEntry).where(LedgerEntry.budget_id == budget_id)
