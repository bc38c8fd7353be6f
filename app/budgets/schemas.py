"""Budgets and ledger entries on the wire."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.budgets.status import BudgetStatus
from app.budgets.tables import LedgerEntry, PrivacyBudget


class CreateBudget(BaseModel):
    """A limit over all jobs on the files that will be attached to it."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    epsilon_limit: float = Field(gt=0, allow_inf_nan=False)
    delta: float = Field(gt=0, lt=1, allow_inf_nan=False)
    neighboring_relation: Literal["zero_out"] = "zero_out"


def render(budget: PrivacyBudget, status: BudgetStatus) -> dict[str, Any]:
    """The budget with what is left of it. Every ε is at the budget's δ; they do not add up (`app.budgets.status`)."""
    return {
        "id": budget.id,
        "object": "privacy_budget",
        "name": budget.name,
        "is_default": budget.is_default,
        "status": budget.status,
        "created_at": int(budget.created_at),
        "epsilon_limit": budget.epsilon_limit,
        "delta": budget.delta,
        "neighboring_relation": budget.neighboring_relation,
        "privacy_unit": budget.privacy_unit,
        "epsilon_spent": status.spent.epsilon,
        "epsilon_spent_accountant": status.spent.accountant,
        "epsilon_reserved": status.reserved,
        "epsilon_remaining": status.remaining,
        "if_fixed_in_advance": {
            "epsilon": status.if_fixed_in_advance.epsilon,
            "accountant": status.if_fixed_in_advance.accountant,
        },
        "rdp_order": budget.rdp_order,
        "rho_capacity": budget.rho_capacity,
        "ledger_head": {"sequence": budget.next_sequence - 1, "hash": budget.head_hash},
    }


def render_entry(entry: LedgerEntry) -> dict[str, Any]:
    """The entry with everything that its hash covers, so that a reader can check the chain (`app.budgets.ledger`)."""
    return {
        "id": entry.id,
        "object": "privacy_budget.entry",
        "budget_id": entry.budget_id,
        "sequence": entry.sequence,
        "kind": entry.kind,
        "job_id": entry.job_id,
        "actor": entry.actor,
        "rho": entry.rho,
        "dp_event": entry.dp_event,
        "details": entry.details,
        "created_at": entry.created_at,
        "previous_hash": entry.previous_hash,
        "hash": entry.hash,
    }
