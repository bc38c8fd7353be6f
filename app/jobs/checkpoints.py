"""Checkpoints that can be taken: after which steps they are published, and how the wire shows them.

Each is a model of its own, with a report of the steps until there. Which steps these are follows from the plan and the
request alone, never from time or data.
"""

from __future__ import annotations

from typing import Any

from app.jobs.tables import Job
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
