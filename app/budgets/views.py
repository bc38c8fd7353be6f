"""Budgets, ledger entries and the timeline on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.budgets import owner
from app.budgets.audit import Audit
from app.budgets.repository import Point
from app.budgets.service import accounting_of, status_of
from app.budgets.status import BudgetStatus
from app.budgets.tables import LedgerEntry, PrivacyBudget


def render(budget: PrivacyBudget, status: BudgetStatus) -> dict[str, Any]:
    """The budget with what is left of it. Every ε is at the budget's δ; they do not add up (`app.budgets.status`)."""
    fixed = status.if_fixed_in_advance
    return {
        "id": budget.id,
        "object": "privacy_budget",
        "name": budget.name,
        "is_default": budget.is_default,
        "status": status_of(budget),
        "created_at": int(budget.created_at),
        "epsilon_limit": budget.epsilon_limit,
        "delta": budget.delta,
        "neighboring_relation": budget.neighboring_relation,
        "privacy_unit": budget.privacy_unit,
        "policy": budget.policy,
        "epsilon_spent": status.spent.epsilon,
        "epsilon_spent_accountant": status.spent.accountant,
        "epsilon_reserved": status.reserved,
        "epsilon_remaining": status.remaining,
        "if_fixed_in_advance": None if fixed is None else {"epsilon": fixed.epsilon, "accountant": fixed.accountant},
        "epsilon_at": [
            {"delta": at.delta, "epsilon_spent": at.spent, "if_fixed_in_advance": at.if_fixed_in_advance}
            for at in status.at
        ],
        "rdp_order": budget.rdp_order,
        "rho_capacity": budget.rho_capacity,
        "rho_spent": status.usage.charged,
        "rho_reserved": status.usage.reserved,
        "rho_remaining": status.rho_remaining,
        "fraction_used": min(1.0, status.usage.total / budget.rho_capacity),
        "still_fit": None if status.last is None else _still_fit(status),
        "ledger_head": {"sequence": budget.next_sequence - 1, "hash": budget.head_hash},
        "lock": None if budget.foreign_head is None else _lock(budget, status.usage.total),
    }


def _still_fit(status: BudgetStatus) -> dict[str, Any]:
    """ "3 more jobs like the last one"."""
    assert status.last is not None
    return {"like_job": status.last.job_id, "rho_each": status.last.rho, "jobs": status.more_like_last}


def _lock(budget: PrivacyBudget, used: float) -> dict[str, Any]:
    assert budget.foreign_head is not None
    head = budget.foreign_head
    return {
        "code": "budget_locked",
        "detected_at": int(head["detected_at"]),
        "store_head": {"sequence": head["sequence"], "hash": head["hash"], "rho": head["rho"]},
        "rho_missing": owner.missing_rho([head], used),
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


def render_point(budget: PrivacyBudget, point: Point) -> dict[str, Any]:
    """ε by the filter at the budget's δ, right after an entry: of what was charged, and what reservations added."""
    accounting = accounting_of(budget)
    charged = accounting.epsilon_of(point.charged)
    return {
        "id": point.entry_id,
        "object": "privacy_budget.point",
        "created_at": point.created_at,
        "kind": point.kind,
        "job_id": point.job_id,
        "epsilon_charged": charged,
        "epsilon_reserved": max(0.0, accounting.epsilon_of(point.charged + point.reserved) - charged),
        "rho_charged": point.charged,
        "rho_reserved": point.reserved,
    }


def render_limits(entries: Sequence[LedgerEntry]) -> list[dict[str, Any]]:
    """From when on which limit held."""
    return [{"created_at": entry.created_at, "epsilon_limit": entry.details["epsilon_limit"]} for entry in entries]


def render_audit(budget: PrivacyBudget, audit: Audit) -> dict[str, Any]:
    """What was checked, and where it breaks."""
    return {
        "object": "privacy_budget.audit",
        "budget_id": budget.id,
        "intact": audit.intact,
        "entries": audit.entries,
        "first_broken_sequence": audit.first_broken,
        "sums_agree": audit.sums_agree,
        "ledger_head": {"sequence": budget.next_sequence - 1, "hash": budget.head_hash},
    }
