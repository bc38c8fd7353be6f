"""What a budget's owner does with it: every act is an entry of its ledger, under the budget's lock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.budgets import ledger, repository, service
from app.budgets.tables import PrivacyBudget
from app.db.base import now
from app.errors import BudgetExceeded, Conflict, InvalidRequest
from app.privacy.filter import UNIT, RenyiBudget


def rename(session: Session, budget: PrivacyBudget, name: str, actor: str) -> None:
    """Another name; the same one changes nothing."""
    if name != budget.name:
        details = {"name": name, "previous": budget.name}
        budget.name = name
        ledger.append(session, budget, "renamed", actor=actor, details=details)


def set_policy(session: Session, budget: PrivacyBudget, policy: Mapping[str, float | None] | None, actor: str) -> None:
    """What a single job may promise at most, from now on."""
    if policy != budget.policy:
        details = {"policy": policy, "previous": budget.policy}
        budget.policy = None if policy is None else dict(policy)
        ledger.append(session, budget, "policy_changed", actor=actor, details=details)


def set_limit(session: Session, budget: PrivacyBudget, epsilon_limit: float, actor: str) -> None:
    """Another limit at the same δ and order: the filter's theorem wants the order fixed before the first plan.

    Raises BudgetExceeded (limit_below_spent) where what is charged and reserved would not fit, InvalidRequest where
    nothing would. A closed or locked budget keeps its limit.
    """
    service.require_open(budget)
    if epsilon_limit == budget.epsilon_limit:
        return
    try:
        accounting = RenyiBudget(epsilon_limit, budget.delta, budget.rdp_order)
    except ValueError as error:
        raise InvalidRequest("invalid_budget", f"This limit cannot be: {error}.", param="epsilon_limit") from error
    used = repository.usage(session, budget.id).total
    if used > accounting.capacity:
        raise BudgetExceeded(
            "limit_below_spent",
            "The limit cannot be lower than what is spent and reserved.",
            param="epsilon_limit",
            privacy_budget=budget.id,
            epsilon_committed=service.accounting_of(budget).epsilon_of(used),
        )
    details = {"epsilon_limit": epsilon_limit, "rho_capacity": accounting.capacity, "previous": budget.epsilon_limit}
    kind: ledger.Kind = "limit_raised" if epsilon_limit > budget.epsilon_limit else "limit_lowered"
    budget.epsilon_limit, budget.rho_capacity = epsilon_limit, accounting.capacity
    ledger.append(session, budget, kind, actor=actor, details=details)


def close(session: Session, budget: PrivacyBudget, actor: str) -> None:
    """No further plan is admitted; jobs that hold a reservation go on. Closing twice changes nothing."""
    if budget.status == "open":
        budget.status = "closed"
        ledger.append(session, budget, "closed", actor=actor, details={"reason": "requested"})


def lock_for(session: Session, budget_id: str, evidence: Mapping[str, Any]) -> None:
    """The store kept a head that this ledger does not know: nothing is admitted and no job starts from now on."""
    budget = service.lock(session, budget_id)
    if budget.foreign_head is None:
        detected_at = session.scalars(select(now())).one()
        budget.foreign_head = {**evidence, "detected_at": detected_at}
        ledger.append(session, budget, "locked", actor="service", details={"store": dict(evidence)})


def missing_rho(heads: Sequence[Mapping[str, Any]], used: float) -> float | None:
    """ρ that the store's heads count and the database does not; None where one could not be read."""
    counted = [head["rho"] for head in heads]
    return None if None in counted else max(0.0, max(counted) - used)


def reconcile(
    session: Session,
    budget: PrivacyBudget,
    rho: float | None,
    note: str | None,
    actor: str,
    *,
    store: Mapping[str, Any] | None,
) -> None:
    """Unlocks: charges what the database forgot, and in full what it believes to be waiting or running.

    Those jobs may have run to their end before the restore, so they never run again (`service.standing`). With every
    reservation charged, what is charged in all is at least Σρ of the store's head, which counted all that was released.
    rho: more than that, or what has to be stated where the store's head is unreadable. store: what the store holds by
    now where this ledger does not know it either; the entry names it, and thereby knows it.
    Raises Conflict (budget_not_locked), InvalidRequest (rho_required, rho_too_small).
    """
    if budget.foreign_head is None:
        raise Conflict("budget_not_locked", "This privacy budget is not locked.")
    heads = [budget.foreign_head] if store is None else [budget.foreign_head, store]
    missing = missing_rho(heads, repository.usage(session, budget.id).total)
    stated = missing if rho is None else rho
    if stated is None:
        raise InvalidRequest(
            "rho_required", "What was forgotten is not known: state the ρ that shall be charged for it.", param="rho"
        )
    charge = math.ceil(stated / UNIT) * UNIT
    if missing is not None and charge < missing:
        raise InvalidRequest(
            "rho_too_small", "At least what the database forgot has to be charged.", param="rho", rho_missing=missing
        )
    for reservation in repository.unsettled_on(session, budget.id):
        service.settle_one(session, budget, reservation, reservation.dp_event, reservation.rho, actor)
    budget.foreign_head = None
    budget.rho_reconciled += charge
    details = {"store": [dict(head) for head in heads], "rho_missing": missing, "note": note}
    ledger.append(session, budget, "reconciled", actor=actor, rho=charge, details=details)
