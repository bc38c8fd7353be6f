"""What a submit would come to, on the wire."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from app.budgets import service as budgets
from app.budgets.status import remaining_epsilon
from app.errors import BudgetExceeded
from app.jobs import repository, views
from app.jobs.planning import Planned


def render(session: Session, project_id: str, planned: Planned) -> dict[str, Any]:
    """A plan that fits. memory_bytes and seconds are null: nothing measured stands behind a figure yet."""
    charges = [charge.to_dict() for charge in planned.charges]
    plan = planned.plan
    private = plan.mechanism != "none"
    return {
        "object": "fine_tuning.job.estimate",
        "feasible": True,
        "privacy": views.describe(plan, charges) if private else {"mechanism": "none"},
        "num_steps": sum(part.num_steps for part in plan.parts),
        "hyperparameters": planned.hyperparameters,
        "task": _task(planned.resolved["task"]),
        "adaptation": planned.resolved["adaptation"],
        "auto": planned.resolved["auto"],
        "evaluation": planned.resolved["evaluation"],
        "checkpoint_steps": planned.resolved["checkpoint_steps"],
        "budgets": [_after(session, project_id, charge) for charge in charges],
        "queue_position": repository.queue_length(session) + 1,
        "memory_bytes": None,
        "seconds": None,
        "error": None,
        "nearest_plan": None,
    }


def render_refusal(error: BudgetExceeded) -> dict[str, Any]:
    """A plan that does not fit: why, what is left, and the nearest that fits."""
    extra = dict(error.extra)
    nearest = extra.pop("nearest_plan", None)
    return {
        "object": "fine_tuning.job.estimate",
        "feasible": False,
        "error": {"code": error.code, "message": error.message, "param": error.param, "type": error.type, **extra},
        "nearest_plan": nearest,
    }


def _task(task: dict[str, Any]) -> dict[str, Any]:
    """Classes taken from the file are told by the job that states them as public: here only how many there are."""
    told = {name: value for name, value in task.items() if name != "labels" or task["labels_source"] != "file"}
    return {**told, "num_labels": len(task["labels"])}


def _after(session: Session, project_id: str, charge: dict[str, Any]) -> dict[str, Any]:
    budget = budgets.get(session, project_id, charge["budget_id"])
    accounting = budgets.accounting_of(budget)
    used = budgets.usage(session, budget.id).total
    return {
        "privacy_budget": budget.id,
        "epsilon_limit": budget.epsilon_limit,
        "epsilon_remaining": remaining_epsilon(accounting, used),
        "epsilon_remaining_after": remaining_epsilon(accounting, used + charge["rho"]),
    }
