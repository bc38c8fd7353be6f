"""The ledger against itself, and against what admission counts."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.budgets import ledger, repository
from app.budgets.tables import LedgerEntry, PrivacyBudget


@dataclass(frozen=True, slots=True)
class Audit:
    """first_broken: the first sequence number at which the chain does not hold. sums_agree: whether Σρ of the ledger,
    charged and reserved, is Σρ of the reservations, which admission adds up."""

    entries: int
    first_broken: int | None
    sums_agree: bool

    @property
    def intact(self) -> bool:
        """Nothing is amiss."""
        return self.first_broken is None and self.sums_agree


def of(session: Session, budget: PrivacyBudget) -> Audit:
    """Reads the whole ledger, a few hundred entries at a time."""
    statement = repository.entries(budget.id).order_by(LedgerEntry.sequence).execution_options(yield_per=500)
    with session.scalars(statement) as entries:  # a cursor of the server's, left in the middle where the chain breaks
        first_broken = ledger.first_broken(entries, budget)
    sums = repository.Usage(*repository.ledger_sums(session, budget.id))
    return Audit(
        entries=budget.next_sequence - 1,
        first_broken=first_broken,
        sums_agree=sums == repository.usage(session, budget.id),
    )
