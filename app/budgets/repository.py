"""Queries of budgets. What a project may not see is not in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, case, func, select
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
    """Sums over the budget's reservations, and what was reconciled: exact, since each ρ is a whole number of units."""
    reserved = Reservation.state == "reserved"
    reconciled = select(PrivacyBudget.rho_reconciled).where(PrivacyBudget.id == budget_id).scalar_subquery()
    row = session.execute(
        select(
            func.coalesce(func.sum(case((reserved, 0.0), else_=Reservation.rho_charged)), 0.0),
            func.coalesce(func.sum(case((reserved, Reservation.rho), else_=0.0)), 0.0),
            func.coalesce(reconciled, 0.0),
        ).where(Reservation.budget_id == budget_id)
    ).one()
    return Usage(charged=float(row[0]) + float(row[2]), reserved=float(row[1]))


def unsettled(session: Session, job_id: str) -> Sequence[Reservation]:
    """What the job still holds, in the order in which its budgets are locked."""
    return session.scalars(
        select(Reservation)
        .where(Reservation.job_id == job_id, Reservation.state == "reserved")
        .order_by(Reservation.budget_id)
        .execution_options(populate_existing=True)
    ).all()


def unsettled_on(session: Session, budget_id: str) -> Sequence[Reservation]:
    """What jobs hold of the budget, oldest first. The caller holds its lock."""
    return session.scalars(
        select(Reservation)
        .where(Reservation.budget_id == budget_id, Reservation.state == "reserved")
        .order_by(Reservation.id)
        .execution_options(populate_existing=True)
    ).all()


def of_job(session: Session, job_id: str) -> Sequence[tuple[PrivacyBudget, str]]:
    """The budgets that the job's plan touches, in id order, with the state of its reservation on each."""
    rows = session.execute(
        select(PrivacyBudget, Reservation.state)
        .join(Reservation, Reservation.budget_id == PrivacyBudget.id)
        .where(Reservation.job_id == job_id)
        .order_by(PrivacyBudget.id)
    )
    return [(budget, state) for budget, state in rows]


def last_admitted(session: Session, budget_id: str) -> Reservation | None:
    """The newest reservation, whatever became of it."""
    return session.scalars(
        select(Reservation).where(Reservation.budget_id == budget_id).order_by(Reservation.id.desc()).limit(1)
    ).one_or_none()


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


def entry_at(session: Session, budget_id: str, sequence: int) -> LedgerEntry | None:
    """The entry of that number."""
    return session.scalars(entries(budget_id).where(LedgerEntry.sequence == sequence)).one_or_none()


def find_entry(session: Session, budget_id: str, entry_id: str) -> LedgerEntry | None:
    """The budget's entry of that id."""
    return session.scalars(entries(budget_id).where(LedgerEntry.id == entry_id)).one_or_none()


def entries_of_kind(session: Session, budget_id: str, *kinds: str) -> Sequence[LedgerEntry]:
    """All entries of these kinds, oldest first."""
    return session.scalars(entries(budget_id).where(LedgerEntry.kind.in_(kinds)).order_by(LedgerEntry.sequence)).all()


@dataclass(frozen=True, slots=True)
class Point:
    """The sums right after a ledger entry that moved ρ."""

    entry_id: str
    created_at: float
    kind: str
    job_id: str | None
    charged: float
    reserved: float


def timeline(session: Session, budget_id: str, after: int, limit: int) -> Sequence[Point]:
    """Running sums over the ledger, oldest first, of at most `limit` entries behind the sequence number `after`."""
    kind = LedgerEntry.kind
    charged, reserved = _moves()
    sums = (
        select(
            LedgerEntry.id,
            LedgerEntry.sequence,
            LedgerEntry.created_at,
            kind,
            LedgerEntry.job_id,
            func.sum(charged).over(order_by=LedgerEntry.sequence).label("charged"),
            func.sum(reserved).over(order_by=LedgerEntry.sequence).label("reserved"),
        )
        .where(LedgerEntry.budget_id == budget_id, kind.in_(("reserved", "charged", "released", "reconciled")))
        .subquery()
    )
    columns = (sums.c.id, sums.c.created_at, sums.c.kind, sums.c.job_id, sums.c.charged, sums.c.reserved)
    rows = session.execute(select(*columns).where(sums.c.sequence > after).order_by(sums.c.sequence).limit(limit))
    return [Point(*row) for row in rows]


def ledger_sums(session: Session, budget_id: str) -> tuple[float, float]:
    """ρ charged and reserved, by the ledger alone."""
    charged, reserved = (func.coalesce(func.sum(move), 0.0) for move in _moves())
    row = session.execute(select(charged, reserved).where(LedgerEntry.budget_id == budget_id)).one()
    return float(row[0]), float(row[1])


def _moves() -> tuple[ColumnElement[float], ColumnElement[float]]:
    """What an entry adds to what is charged, and to what is reserved."""
    kind, rho = LedgerEntry.kind, LedgerEntry.rho
    charged = case((kind.in_(("charged", "reconciled")), rho), else_=0.0)
    reserved = case((kind == "reserved", rho), (kind.in_(("charged", "released")), -rho), else_=0.0)
    return charged, reserved
