"""/v1/privacy_budgets."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from app.budgets import repository, schemas, service, status
from app.budgets.tables import LedgerEntry, PrivacyBudget
from app.http.deps import Admin, DatabaseDep, Reader, Reading
from app.http.pagination import Page, list_response, paginate

router = APIRouter(prefix="/privacy_budgets", tags=["privacy budgets"])


@router.post("")
def create_budget(body: schemas.CreateBudget, caller: Admin, database: DatabaseDep) -> dict[str, Any]:
    """Makes a budget. Files attach to it at upload."""
    with database.writing() as session:
        budget = service.create(
            session,
            project_id=caller.project_id,
            name=body.name,
            epsilon_limit=body.epsilon_limit,
            delta=body.delta,
            actor=caller.key_id,
        )
        state = status.read(session, budget)
    return schemas.render(budget, status.derive(state))


@router.get("")
def list_budgets(caller: Reader, database: DatabaseDep, page: Page) -> dict[str, Any]:
    """The project's budgets, newest first."""
    with database.reading() as session:
        rows, has_more = paginate(session, repository.readable(caller.project_id), PrivacyBudget, page)
        states = [status.read(session, budget) for budget in rows]
    rendered = [schemas.render(budget, status.derive(state)) for budget, state in zip(rows, states, strict=True)]
    return list_response(rendered, has_more)


@router.get("/{budget_id}")
def retrieve_budget(budget_id: str, caller: Reader, database: DatabaseDep) -> dict[str, Any]:
    """Limit, δ, spent, reserved, remaining."""
    with database.reading() as session:
        budget = service.get(session, caller.project_id, budget_id)
        state = status.read(session, budget)
    return schemas.render(budget, status.derive(state))  # a PLD takes a moment: no transaction waits for it


@router.get("/{budget_id}/entries")
def list_entries(budget_id: str, caller: Reader, session: Reading, page: Page) -> dict[str, Any]:
    """The ledger, newest first; `order=asc` reads it as it was written."""
    budget = service.get(session, caller.project_id, budget_id)
    rows, has_more = paginate(session, repository.entries(budget.id), LedgerEntry, page, key=LedgerEntry.sequence)
    return list_response([schemas.render_entry(entry) for entry in rows], has_more)
