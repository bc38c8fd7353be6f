"""/v1/privacy_budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from app.auth.service import Caller
from app.budgets import audit, heads, owner, repository, schemas, service, status, views
from app.budgets.tables import LedgerEntry, PrivacyBudget
from app.db.session import Database
from app.errors import InvalidRequest
from app.http.deps import Admin, DatabaseDep, Reader, Reading, StorageDep
from app.http.pagination import Page, list_response, paginate
from app.http.problems import answered

router = APIRouter(prefix="/privacy_budgets", tags=["privacy budgets"])


@router.post("", **answered(schemas.BudgetOut))
def create_budget(body: schemas.CreateBudget, caller: Admin, database: DatabaseDep) -> dict[str, Any]:
    """Makes a budget. Files attach to it at upload."""
    with database.writing() as session:
        budget = service.create(
            session,
            project_id=caller.project_id,
            name=body.name,
            epsilon_limit=body.epsilon_limit,
            delta=body.delta,
            unit_column=body.privacy_unit.column,
            policy=_policy(body.policy),
            actor=caller.key_id,
        )
    return _retrieved(database, caller, budget.id)


@router.get("", **answered(schemas.BudgetList))
def list_budgets(caller: Reader, database: DatabaseDep, page: Page) -> dict[str, Any]:
    """The project's budgets, newest first."""
    with database.reading() as session:
        rows, has_more = paginate(session, repository.readable(caller.project_id), PrivacyBudget, page)
        states = _states(session, rows)
    return list_response(_rendered(rows, states), has_more)


@router.get("/{budget_id}", **answered(schemas.BudgetOut))
def retrieve_budget(budget_id: str, caller: Reader, database: DatabaseDep) -> dict[str, Any]:
    """Limit, δ, spent, reserved, remaining, and what would still fit."""
    return _retrieved(database, caller, budget_id)


@router.post("/{budget_id}", **answered(schemas.BudgetOut))
def update_budget(budget_id: str, body: schemas.UpdateBudget, caller: Admin, database: DatabaseDep) -> dict[str, Any]:
    """Another name, limit or policy: entries of the ledger, all or none. A limit is never below what is spent."""
    with database.writing() as session:
        budget = _locked(session, caller, budget_id)
        if body.name is not None:
            owner.rename(session, budget, body.name, caller.key_id)
        if "policy" in body.model_fields_set:
            owner.set_policy(session, budget, _policy(body.policy), caller.key_id)
        if body.epsilon_limit is not None:
            owner.set_limit(session, budget, body.epsilon_limit, caller.key_id)
    return _retrieved(database, caller, budget_id)


@router.post("/{budget_id}/close", **answered(schemas.BudgetOut))
def close_budget(budget_id: str, caller: Admin, database: DatabaseDep) -> dict[str, Any]:
    """No further job is admitted; those that were go on. There is no way back."""
    with database.writing() as session:
        owner.close(session, _locked(session, caller, budget_id), caller.key_id)
    return _retrieved(database, caller, budget_id)


@router.post("/{budget_id}/reconcile", **answered(schemas.BudgetOut))
def reconcile_budget(
    budget_id: str, caller: Admin, database: DatabaseDep, storage: StorageDep, body: schemas.Reconcile | None = None
) -> dict[str, Any]:
    """Unlocks a budget whose database was restored: charges what it forgot, and in full what it believes to be waiting
    or running; those jobs never run again."""
    with database.reading() as session:
        service.get(session, caller.project_id, budget_id)
    chosen = body or schemas.Reconcile()
    heads.reconcile(database, storage, budget_id, chosen.rho, chosen.note, caller.key_id)
    return _retrieved(database, caller, budget_id)


@router.get("/{budget_id}/entries", **answered(schemas.EntryList))
def list_entries(budget_id: str, caller: Reader, session: Reading, page: Page) -> dict[str, Any]:
    """The ledger, newest first; `order=asc` reads it as it was written."""
    budget = service.get(session, caller.project_id, budget_id)
    rows, has_more = paginate(session, repository.entries(budget.id), LedgerEntry, page, key=LedgerEntry.sequence)
    return list_response([views.render_entry(entry) for entry in rows], has_more)


@router.get("/{budget_id}/timeline", **answered(schemas.Timeline))
def read_timeline(
    budget_id: str,
    caller: Reader,
    session: Reading,
    after: Annotated[str | None, Query(max_length=128, description="The last id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> dict[str, Any]:
    """Points to plot, oldest first: ε charged and reserved after each entry that moved them; and the limits."""
    budget = service.get(session, caller.project_id, budget_id)
    position = 0
    if after is not None:
        entry = repository.find_entry(session, budget.id, after)
        if entry is None:
            raise InvalidRequest("invalid_after", "`after` is not the id of an object in this list.", param="after")
        position = entry.sequence
    points = repository.timeline(session, budget.id, position, limit + 1)
    limits = repository.entries_of_kind(session, budget.id, "opened", "limit_raised", "limit_lowered")
    return list_response([views.render_point(budget, point) for point in points[:limit]], len(points) > limit) | {
        "delta": budget.delta,
        "limits": views.render_limits(limits),
    }


@router.get("/{budget_id}/audit", **answered(schemas.AuditOut))
def audit_ledger(budget_id: str, caller: Reader, session: Reading) -> dict[str, Any]:
    """Every hash of the chain computed again, and its sums compared with what admission counts."""
    budget = service.get(session, caller.project_id, budget_id)
    return views.render_audit(budget, audit.of(session, budget))


def _locked(session: Session, caller: Caller, budget_id: str) -> PrivacyBudget:
    service.get(session, caller.project_id, budget_id)
    return service.lock(session, budget_id)


def _policy(policy: schemas.Policy | None) -> dict[str, float | None] | None:
    return None if policy is None else policy.model_dump()


_State = status.BudgetState | status.BudgetStatus


def _states(session: Session, budgets: Sequence[PrivacyBudget]) -> list[_State]:
    return [status.remembered(budget) or status.read(session, budget) for budget in budgets]


def _rendered(budgets: Sequence[PrivacyBudget], states: Sequence[_State]) -> list[dict[str, Any]]:
    """A PLD takes a moment: no transaction waits for it."""
    return [
        views.render(budget, state if isinstance(state, status.BudgetStatus) else status.derive(state))
        for budget, state in zip(budgets, states, strict=True)
    ]


def _retrieved(database: Database, caller: Caller, budget_id: str) -> dict[str, Any]:
    with database.reading() as session:
        budget = service.get(session, caller.project_id, budget_id)
        states = _states(session, [budget])
    return _rendered([budget], states)[0]
