"""Budgets: made, admitted to, settled. Nothing here computes a PLD under a lock, and nothing commits.

What an owner does with one afterwards is in `owner`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.budgets import ledger, repository
from app.budgets.repository import Usage
from app.budgets.tables import PrivacyBudget, Reservation
from app.db.base import now
from app.errors import BudgetExceeded, InvalidRequest, NotFound
from app.ids import new_id
from app.privacy.filter import RenyiBudget
from app.privacy.plan import ZERO_OUT


@dataclass(frozen=True, slots=True)
class Charge:
    """What a plan takes from one budget.

    dp_event: JSON form of the event of all its parts that touch the budget's data. rho: of that event, at the budget's
    order. first_plan_epsilon: its PLD ε at the *budget's* δ, where the plan may need to be admitted by that alone.
    unit_column: the column that names the plan's privacy unit; None: the record.
    """

    budget_id: str
    dp_event: Mapping[str, Any]
    rho: float
    first_plan_epsilon: float | None = None
    unit_column: str | None = None


class BudgetLocked(BudgetExceeded):
    """The database does not know all that this budget was spent on: nothing is admitted before it is reconciled."""


def create(
    session: Session,
    *,
    project_id: str,
    name: str,
    epsilon_limit: float,
    delta: float,
    actor: str,
    is_default: bool = False,
    unit_column: str | None = None,
    policy: Mapping[str, float | None] | None = None,
) -> PrivacyBudget:
    """A new, empty budget and the first entry of its ledger. Raises InvalidRequest on a limit that promises nothing.

    unit_column, policy: as in `Charge` and `tables.PrivacyBudget`.
    """
    try:
        accounting = RenyiBudget.create(epsilon_limit, delta)
    except ValueError as error:
        raise InvalidRequest("invalid_budget", f"This budget cannot be: {error}.", param="epsilon_limit") from error
    budget = PrivacyBudget(
        id=new_id("pb"),
        project_id=project_id,
        name=name,
        is_default=is_default,
        epsilon_limit=epsilon_limit,
        delta=delta,
        neighboring_relation=ZERO_OUT,
        privacy_unit={"column": unit_column},
        policy=dict(policy) if policy is not None else None,
        rho_reconciled=0.0,
        rdp_order=accounting.order,
        rho_capacity=accounting.capacity,
        status="open",
        created_at=session.scalars(select(now())).one(),
        next_sequence=1,
        head_hash=ledger.GENESIS,
    )
    session.add(budget)
    session.flush()
    ledger.append(
        session,
        budget,
        "opened",
        actor=actor,
        details={
            "epsilon_limit": epsilon_limit,
            "delta": delta,
            "neighboring_relation": ZERO_OUT,
            "privacy_unit": {"column": unit_column},
            "policy": budget.policy,
            "rdp_order": accounting.order,
            "rho_capacity": accounting.capacity,
        },
    )
    return budget


def get(session: Session, project_id: str, budget_id: str) -> PrivacyBudget:
    """The project's budget of that id; NotFound without one."""
    budget = repository.find(session, project_id, budget_id)
    if budget is None:
        raise NotFound("privacy_budget")
    return budget


def default_for(session: Session, project_id: str) -> PrivacyBudget:
    """The project's own budget; NotFound without one."""
    budget = repository.find_default(session, project_id)
    if budget is None:
        raise NotFound("privacy_budget")
    return budget


def accounting_of(budget: PrivacyBudget) -> RenyiBudget:
    """The budget as a filter."""
    return RenyiBudget(budget.epsilon_limit, budget.delta, budget.rdp_order)


def usage(session: Session, budget_id: str) -> Usage:
    """ρ charged and reserved, for planning; admission sums again under the lock."""
    return repository.usage(session, budget_id)


def reserve(session: Session, job_id: str, charges: Sequence[Charge], actor: str) -> None:
    """Takes the whole planned cost from every budget that the plan touches, or from none.

    Locks the budgets in id order. A plan is admitted by the Rényi filter, or, as the first on its budget, by its PLD
    alone. Raises BudgetExceeded (codes budget_exceeded, budget_closed, budget_locked) or InvalidRequest (another
    privacy unit); the caller's unit of work then rolls back.
    """
    for charge in sorted(charges, key=lambda charge: charge.budget_id):
        budget = lock(session, charge.budget_id)
        require_open(budget)
        require_unit(budget.id, budget.privacy_unit["column"], charge.unit_column)
        used = repository.usage(session, budget.id)
        if not admissible(accounting_of(budget), used, charge):
            raise BudgetExceeded(
                "budget_exceeded",
                "This plan does not fit what is left of the privacy budget.",
                param="privacy.target_epsilon",
                privacy_budget=budget.id,
                epsilon_limit=budget.epsilon_limit,
            )
        event = dict(charge.dp_event)
        session.add(
            Reservation(
                id=new_id("res"),
                budget_id=budget.id,
                job_id=job_id,
                state="reserved",
                rho=charge.rho,
                rho_charged=0.0,
                dp_event=event,
                created_at=session.scalars(select(now())).one(),
            )
        )
        ledger.append(session, budget, "reserved", actor=actor, job_id=job_id, rho=charge.rho, dp_event=event)


def status_of(budget: PrivacyBudget) -> Literal["open", "closed", "locked"]:
    """Locked goes before closed: it needs an admin."""
    if budget.foreign_head is not None:
        return "locked"
    return "open" if budget.status == "open" else "closed"


def require_open(budget: PrivacyBudget) -> None:
    """Raises BudgetExceeded (codes budget_locked, budget_closed) for a budget that takes no further plans."""
    require_unlocked(budget)
    if budget.status != "open":
        raise closed(budget.id)


def require_unlocked(budget: PrivacyBudget) -> None:
    """Raises BudgetLocked (code budget_locked)."""
    if budget.foreign_head is not None:
        raise BudgetLocked(
            "budget_locked",
            "This privacy budget's ledger is older than what was published from it: an admin has to reconcile it.",
            param="training_file",
            privacy_budget=budget.id,
        )


def require_unit(
    budget_id: str, budgets_column: str | None, column: str | None, *, param: str = "privacy.privacy_unit"
) -> None:
    """Raises InvalidRequest (code privacy_unit_mismatch) for another unit than the one that the budget declares.

    column: of the job's unit, or of a file's.

    A budget that declares none is about the unit of each file; ε for a record says nothing about a person.
    """
    if budgets_column is not None and budgets_column != column:
        raise InvalidRequest(
            "privacy_unit_mismatch",
            "This privacy budget fixes another privacy unit.",
            param=param,
            privacy_budget=budget_id,
        )


def closed(budget_id: str) -> BudgetExceeded:
    """What a job on a closed budget is told."""
    return BudgetExceeded(
        "budget_closed",
        "This privacy budget is closed: no further job may read its files.",
        param="training_file",
        privacy_budget=budget_id,
    )


def admissible(accounting: RenyiBudget, used: Usage, charge: Charge) -> bool:
    """Whether the charge fits beside what is used: by the filter, or by PLD alone where nothing is used yet."""
    if accounting.admits(used.total, charge.rho):
        return True
    epsilon = charge.first_plan_epsilon
    return used.total == 0.0 and epsilon is not None and epsilon <= accounting.epsilon_limit


def settle(
    session: Session, job_id: str, charged: Mapping[str, tuple[Mapping[str, Any], float]] | None, actor: str
) -> None:
    """Turns what the job holds into what it is charged, and gives the rest back. A job that holds nothing: no effect.
    What a reconciliation charged meanwhile stays charged.

    charged: budget id → (event of what was executed, its ρ); a budget left out is charged nothing. None: everything
    that was reserved, as a failure is. Raises ValueError where a charge exceeds its reservation.
    A plan over the filter's capacity (admitted first, by PLD alone) closes its budget unless nothing was executed.
    """
    for reservation in repository.unsettled(session, job_id):
        budget = lock(session, reservation.budget_id)
        session.refresh(reservation)
        if reservation.state == "settled":
            continue  # a reconciliation held the budget's lock, and charged it in full
        if charged is None:
            event, rho = reservation.dp_event, reservation.rho
        elif reservation.budget_id in charged:
            executed, rho = charged[reservation.budget_id]
            event = dict(executed)
        else:
            event, rho = {"type": "no_op"}, 0.0
        settle_one(session, budget, reservation, event, rho, actor)
    session.flush()


def settle_one(
    session: Session, budget: PrivacyBudget, reservation: Reservation, event: Mapping[str, Any], rho: float, actor: str
) -> None:
    """Charges one reservation and gives back its rest. The caller holds the budget's lock."""
    if not 0.0 <= rho <= reservation.rho:
        raise ValueError("a charge never exceeds its reservation")
    job_id = reservation.job_id
    reservation.state = "settled"
    reservation.rho_charged = rho
    reservation.charged_event = dict(event)
    reservation.settled_at = session.scalars(select(now())).one()
    if rho > 0.0:
        ledger.append(session, budget, "charged", actor=actor, job_id=job_id, rho=rho, dp_event=event)
    if rho < reservation.rho:
        ledger.append(session, budget, "released", actor=actor, job_id=job_id, rho=reservation.rho - rho)
    if rho > 0.0 and reservation.rho > budget.rho_capacity and budget.status == "open":
        budget.status = "closed"
        ledger.append(
            session, budget, "closed", actor=actor, job_id=job_id, details={"reason": "first_plan_over_capacity"}
        )


def note_checkpoint(
    session: Session,
    job_id: str,
    released: Mapping[str, Mapping[str, Any]],
    actor: str,
    details: Mapping[str, Any],
) -> None:
    """Part of what a job holds was published before its end: it is reserved, so nothing is charged yet.

    released: budget id → event of what was executed. The entries move the ledgers' heads.
    """
    for budget_id in sorted(released):
        budget = lock(session, budget_id)
        event = released[budget_id]
        ledger.append(
            session, budget, "checkpoint_published", actor=actor, job_id=job_id, dp_event=event, details=details
        )


def standing(session: Session, job_id: str) -> Literal["held", "locked", "charged"]:
    """Whether a queued job may run: all that it needs is held for it, or its data is public.

    locked: not before its budgets are reconciled. charged: never; a reconciliation charged all of it, because what it
    did may have been published before the database forgot.
    """
    found = repository.of_job(session, job_id)
    if any(budget.foreign_head is not None for budget, _ in found):
        return "locked"
    return "charged" if any(state == "settled" for _, state in found) else "held"


def record_act(session: Session, budget_id: str, kind: ledger.Kind, *, actor: str, details: Mapping[str, Any]) -> None:
    """An act of a person that spends nothing, in the budget's ledger: a file declared public, or attached to it."""
    ledger.append(session, lock(session, budget_id), kind, actor=actor, details=details)


def lock(session: Session, budget_id: str) -> PrivacyBudget:
    """The row, under its lock."""
    budget = repository.lock(session, budget_id)
    if budget is None:
        raise NotFound("privacy_budget")
    return budget
