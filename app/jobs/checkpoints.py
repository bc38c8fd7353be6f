"""Checkpoints that can be taken: after which steps they are published, and how the wire shows them.

Each is a model of its own, with a report of the steps until there. Which steps these are follows from the plan and the
request alone, never from time or data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from app.budgets import service as budgets
from app.events import service as events
from app.jobs.tables import Job
from app.models import service as models
from app.models.tables import Model
from app.privacy.plan import PrivacyPlan, SampledGaussian


def steps(plan: PrivacyPlan, count: int) -> list[int]:
    """At most `count` steps, counted over all parts of the plan, that cut its training into pieces of equal length.

    None of them is the last step of training, whose weights are the job's own model.
    """
    first, num_steps = 0, 0
    for part in plan.parts:
        if isinstance(part, SampledGaussian):
            num_steps += part.num_steps
        elif not num_steps:
            first += 1  # released before the first step
    chosen = {first + number * num_steps // (count + 1) for number in range(1, count + 1)}
    return sorted(chosen - {first})


def publish(session: Session, job: Job, step: int, model_fields: Mapping[str, Any], actor: str) -> None:
    """The ledgers take note, so that a database restored from before it is found out and runs no step again.

    model_fields: for `models.service.publish`. actor: who publishes, in the ledger's words.
    """
    report = model_fields["privacy_report"]
    model = models.publish(
        session,
        project_id=job.project_id,
        job_id=job.id,
        base=job.model,
        suffix=job.suffix,
        step_number=step,
        **model_fields,
    )
    released = {budget["privacy_budget"]: budget["dp_event"] for budget in report.get("budgets", ())}
    budgets.note_checkpoint(session, job.id, released, actor, details={"step_number": step, "model": model.id})
    events.record(
        session,
        project_id=job.project_id,
        job_id=job.id,
        code="checkpoint_published",
        message=f"The checkpoint of step {step} can be taken.",
        data={
            "step": step,
            "fine_tuned_model_checkpoint": model.id,
            "epsilon_spent": report["guarantee"]["epsilon"] if "guarantee" in report else None,
        },
    )


def render(job: Job, model: Model) -> dict[str, Any]:
    """`fine_tuning.job.checkpoint`. Its ε is certified for the steps until there, at the job's δ: as in its report."""
    name = f"ftckpt-{job.id.partition('-')[2]}"
    step = model.step_number
    guarantee = model.privacy_report.get("guarantee") or {}
    return {
        "id": name if step is None else f"{name}-{step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(model.created_at),
        "fine_tuned_model_checkpoint": model.id,
        "fine_tuning_job_id": job.id,
        "step_number": sum((job.executed or {}).values()) if step is None else step,
        "metrics": {"step": sum((job.executed or {}).values()) if step is None else step, **_last_loss(model)},
        "epsilon_spent": guarantee.get("epsilon"),
        "delta": guarantee.get("delta"),
        "accountant": guarantee.get("accountant"),
    }


def _last_loss(model: Model) -> dict[str, Any]:
    """The last point of the loss curve until there."""
    curve = (model.metrics or {}).get("train_loss_curve") or [{}]
    return {name: value for name, value in curve[-1].items() if name.startswith("train_loss")}
