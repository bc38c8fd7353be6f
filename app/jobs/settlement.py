"""The end of a job, whatever it was: one transaction that charges, releases, erases and tells.

The caller holds the job's row lock (a guarded UPDATE took it) and has checked the fence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.budgets import service as budgets
from app.db.base import now
from app.events import service as events
from app.files import service as files
from app.jobs import keys
from app.jobs.tables import Job
from app.models import service as models
from app.privacy.dp_events import event_for, to_json
from app.privacy.plan import PrivacyPlan

Terminal = Literal["succeeded", "failed", "cancelled"]

_MESSAGES: dict[Terminal, str] = {
    "succeeded": "The job succeeded.",
    "failed": "The job failed.",
    "cancelled": "The job was cancelled.",
}


def settle(
    session: Session,
    job: Job,
    status: Terminal,
    *,
    executed: Mapping[str, int] | None,
    actor: str,
    error: Mapping[str, Any] | None = None,
) -> None:
    """Ends the job. executed: steps of each part of the plan that were executed; None: unknown, charged in full.

    Steps of a committed checkpoint, and those that attempts told of, count as executed whatever the caller says. Raises
    ValueError for steps that the plan does not have.
    """
    known = at_least((job.progress or {}).get("executed", {}), (job.checkpoint or {}).get("executed", {}))
    if executed is not None:
        executed = at_least(executed, known)
    charged = None if executed is None else _charged(session, job, executed)
    budgets.settle(session, job.id, charged, actor)
    keys.erase(session, job.id)
    files.release(session, job.id)
    models.release(session, job.id)
    job.status = status
    # What is charged in full was not therefore executed: the job tells what is known.
    job.executed = known if executed is None else dict(executed)
    job.error = dict(error) if error is not None else None
    job.lease_expires_at = None
    job.worker = None
    job.interrupted = executed is None
    job.finished_at = session.scalars(select(now())).one()
    session.flush()
    events.record(
        session,
        project_id=job.project_id,
        job_id=job.id,
        code=f"job_{status}",
        message=_MESSAGES[status] if error is None else f"The job failed: {error['message']}",
        level="error" if status == "failed" else "info",
        data={
            "executed": job.executed,
            "charged_in_full": job.interrupted,
            **({"error": error["code"]} if error is not None else {}),
        },
    )


def at_least(executed: Mapping[str, int], known: Mapping[str, int]) -> dict[str, int]:
    """Per part, the larger of two counts."""
    return {name: max(executed.get(name, 0), known.get(name, 0)) for name in {**known, **executed}}


def planned_steps(job: Job) -> dict[str, int]:
    """Every step of the plan; empty for a job that was never planned."""
    if job.plan is None:
        return {}
    return {part.name: part.num_steps for part in PrivacyPlan.from_dict(job.plan).parts}


def _charged(session: Session, job: Job, executed: Mapping[str, int]) -> dict[str, tuple[dict[str, Any], float]]:
    """What each budget is charged for the executed steps; budgets of which nothing was used are left out."""
    if job.plan is None:
        return {}
    plan = PrivacyPlan.from_dict(job.plan)
    cut = plan.executed(executed)
    charged: dict[str, tuple[dict[str, Any], float]] = {}
    for charge in job.charges:
        if cut.parts == plan.parts:
            charged[charge["budget_id"]] = (charge["dp_event"], charge["rho"])
        elif any(part.dataset in charge["datasets"] for part in cut.parts):
            event = event_for(cut, charge["datasets"])
            budget = budgets.get(session, job.project_id, charge["budget_id"])
            # Another host's libm may round the last bit up; a part of a plan never costs more than the plan.
            rho = min(budgets.accounting_of(budget).rho_of(event), charge["rho"])
            charged[charge["budget_id"]] = (to_json(event), rho)
    return charged
