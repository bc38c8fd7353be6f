"""A job on the wire: the client's fields, and our own beside them. Only released and public values."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from app.catalog.recipes import Phase, main_part, main_phase
from app.exports.schemas import render as render_export
from app.exports.tables import Export
from app.jobs.tables import TERMINAL, Job
from app.privacy import loss_curve
from app.privacy.accountants import rdp_epsilon
from app.privacy.dp_events import event_for
from app.privacy.plan import PrivacyPlan, SampledGaussian

RDP_NAME = "RDP, an upper bound for the steps executed"


def render(job: Job, *, now: float, queue_position: int | None, exports: Sequence[Export] = ()) -> dict[str, Any]:
    """`fine_tuning.job`. now: of the database's clock. exports: of its model."""
    resolved = job.resolved or {}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "started_at": _seconds(job.started_at),
        "finished_at": _seconds(job.finished_at),
        "estimated_finish": _seconds(estimated_finish(job, now)),
        "status": job.status,
        "cancel_requested": job.cancel_requested,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.project_id,
        "training_file": job.training_file_id,
        "validation_file": job.validation_file_id,
        "result_files": [],
        "trained_tokens": None,  # of private rows: never told
        "seed": job.seed,
        "hyperparameters": job.hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": job.hyperparameters}},
        "integrations": [],
        "metadata": job.job_metadata,
        "user_provided_suffix": job.suffix,
        "error": job.error,
        "queue_position": queue_position,
        "progress": _progress(job),
        "attempts": job.attempts,
        "task": resolved.get("task"),
        "adaptation": resolved.get("adaptation"),
        "auto": resolved.get("auto"),
        "optimizer": _optimizer(resolved),
        "evaluation": _evaluation(job),
        "checkpoint_steps": resolved.get("checkpoint_steps"),
        "export": job.request.get("export"),
        "exports": [render_export(export).model_dump() for export in exports],
        "privacy": privacy(job),
    }


def privacy(job: Job) -> dict[str, Any]:
    """The privacy block. epsilon_spent covers the steps that are charged, by the accountant named beside it: those in
    `progress`, or the whole plan where `charged_in_full` says so."""
    asked = job.request.get("privacy", {})
    if job.plan is None:
        return {
            "mechanism": asked.get("mechanism", "dp_sgd"),
            "target_epsilon": asked.get("target_epsilon"),
            "target_delta": asked.get("target_delta"),
            "epsilon_reserved": 0.0,
            "epsilon_spent": 0.0,
        }
    plan = PrivacyPlan.from_dict(job.plan)
    if plan.mechanism == "none":
        return {"mechanism": "none", "num_steps": main_part(plan.parts).num_steps, "privacy_budget": None}
    in_full = job.status in TERMINAL and job.interrupted
    charged = {part.name: part.num_steps for part in plan.parts} if in_full else _executed(job)
    spent, accountant = epsilon_of(plan, job.plan_digest or "", charged, (job.resolved or {})["certified_datasets"])
    return {
        **describe(plan, job.charges),
        "epsilon_reserved": 0.0 if job.status in TERMINAL else plan.epsilon,
        "epsilon_spent": spent,
        "epsilon_spent_accountant": accountant,
        "charged_in_full": in_full,
    }


def describe(plan: PrivacyPlan, charges: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A private plan in the words of the wire; `parts` has all of it, the top level its main phase."""
    main = main_part(plan.parts)
    return {
        "mechanism": plan.mechanism,
        "target_epsilon": plan.target_epsilon,
        "target_delta": plan.target_delta,
        "epsilon": plan.epsilon,
        "accountant": plan.accountant,
        "noise_multiplier": main.noise_multiplier,
        "sample_rate": main.sample_rate,
        "num_steps": main.num_steps,
        "max_grad_norm": main.max_grad_norm,
        "clipping": main.clipping,
        "loss_curve": _loss_curve(plan, main),
        "num_units": plan.num_units,
        "privacy_unit": {"column": plan.privacy_unit.column},
        "max_records_per_unit": plan.privacy_unit.max_records_per_unit,
        "neighboring_relation": plan.neighboring_relation,
        "parts": [part for part in plan.to_dict()["parts"]],
        "privacy_budget": charges[0]["budget_id"] if charges else None,
        "privacy_budgets": [charge["budget_id"] for charge in charges],
    }


def _optimizer(resolved: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of the main phase; None before there is a plan. Plans may be older than a field."""
    if not resolved.get("phases"):
        return None
    main = main_phase([Phase.from_dict(phase) for phase in resolved["phases"]])
    return {
        "type": main.optimizer,
        "learning_rate": main.learning_rate,
        "head_learning_rate": main.head_learning_rate,
        "weight_decay": main.weight_decay,
        "momentum": main.momentum if main.optimizer == "sgd" else None,
        "schedule": {"type": main.schedule, "warmup_steps": main.num_warmup_steps},
    }


def _loss_curve(plan: PrivacyPlan, main: SampledGaussian) -> dict[str, Any] | None:
    """What the points of the main phase's loss curve will be; None without one."""
    if main.loss is None:
        return None
    return {
        "bound": main.loss.bound,
        "noise_std_per_step": loss_curve.noise_std(plan, main),
        "num_points": len(loss_curve.window_ends(plan, main)),
    }


def epsilon_of(
    plan: PrivacyPlan, digest: str, executed: Mapping[str, int], datasets: Sequence[str]
) -> tuple[float, str | None]:
    """ε at the target δ of the executed steps, and what says so: the plan's certificate once all were executed, until
    then the RDP bound, a closed form, where it is smaller."""
    steps = {part.name: executed.get(part.name, 0) for part in plan.parts if part.dataset in datasets}
    certified = plan.epsilon if plan.epsilon is not None else float("inf")
    if not any(steps.values()):
        return 0.0, plan.accountant
    if all(part.num_steps == steps[part.name] for part in plan.parts if part.dataset in datasets):
        return certified, plan.accountant
    bound = _executed_epsilon(digest, plan, tuple(sorted(steps.items())), tuple(datasets))
    return (bound, RDP_NAME) if bound < certified else (certified, plan.accountant)


@functools.lru_cache(maxsize=4096)
def _executed_epsilon(
    _digest: str, plan: PrivacyPlan, steps: tuple[tuple[str, int], ...], datasets: tuple[Any, ...]
) -> float:
    assert plan.target_delta is not None
    return rdp_epsilon(event_for(plan.executed(dict(steps)), datasets), plan.target_delta)


def estimated_finish(job: Job, now: float) -> float | None:
    """From this attempt's pace; None where nothing can be said."""
    progress = job.progress
    if job.status != "running" or progress is None or progress.get("fence") != job.fence:
        return None
    done = progress["step"] - progress["first_step"]
    if done <= 0:
        return None
    pace = (progress["at"] - progress["first_at"]) / done
    return max(now, progress["at"] + pace * (progress["num_steps"] - progress["step"]))


def _progress(job: Job) -> dict[str, Any] | None:
    if job.plan is None:
        return None
    plan = PrivacyPlan.from_dict(job.plan)
    total = sum(part.num_steps for part in plan.parts)
    executed = _executed(job)
    phase = (job.progress or {}).get("phase")
    return {"step": sum(executed.values()), "num_steps": total, "phase": phase, "executed": executed}


def _executed(job: Job) -> dict[str, int]:
    """Steps of each part, as far as is known."""
    known: dict[str, int] = (job.progress or {}).get("executed", {})
    return known if job.executed is None else job.executed


def _evaluation(job: Job) -> dict[str, Any] | None:
    """Counts of rows are private where they are not those of the privacy units."""
    if job.resolved is None or job.plan is None:
        return None
    plan, by_record = PrivacyPlan.from_dict(job.plan), PrivacyPlan.from_dict(job.plan).privacy_unit.column is None
    return {
        "metrics": job.resolved["evaluation"],
        "units": plan.num_validation_units,
        "held_out_rows": job.resolved["num_held_out"] if by_record else None,
        "validation_rows": job.resolved["num_validation_rows"] if by_record else None,
    }


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
