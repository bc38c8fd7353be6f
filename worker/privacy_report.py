"""privacy_report.json: what the job's guarantee is, how it was made, what was taken as public, what is not covered.

Built from the plan that was executed and from the ledger, never from the request; signed by the server. Contents after
Ponomareva et al. 2023, "How to DP-fy ML". `app.privacy.report_check` holds the other end: what is written here, it
recomputes.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from app.jobs.lifecycle import Claimed
from app.privacy import report_format as form
from app.privacy.accountants import Figure, attack_power, pld_epsilon, pld_epsilons, stated_discretization
from app.privacy.dp_events import event_for, from_json, to_json
from app.privacy.filter import RenyiBudget
from app.privacy.plan import Dataset, PrivacyPlan, SampledGaussian
from app.signing import ReportKeys

#: Packages that decide what a figure or a weight comes out as.
_PACKAGES = ("privtune", "dp-accounting", "numpy", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class LedgerPosition:
    """Where a budget and its ledger stood when the report was written; the job's reservation is part of it.

    plans: reservations and charges that count against the budget. rho: what they come to.
    """

    budget_id: str
    sequence: int
    head_hash: str
    accounting: RenyiBudget
    plans: int
    rho: float


def build(
    claimed: Claimed,
    executed: Mapping[str, int],
    positions: Sequence[LedgerPosition],
    runtime: Mapping[str, Any],
    keys: ReportKeys,
    *,
    checkpoint: bool = False,
) -> dict[str, Any]:
    """The signed report of a finished job. Takes a second of CPU (PLDs are composed): never inside a transaction.

    checkpoint: of the steps until a checkpoint instead. Raises ValueError where the executed steps are not the plan's,
    from its start: there is no report of half a job otherwise.
    """
    plan, resolved = claimed.plan, claimed.resolved
    done = {part.name: executed.get(part.name, 0) for part in plan.parts}
    if not (form.in_order(plan.to_dict()["parts"], done) if checkpoint else plan.executed(done).parts == plan.parts):
        raise ValueError("the report of a finished job is of its whole plan, of a checkpoint of what comes first in it")
    report: dict[str, Any] = {
        "format": form.FORMAT,
        "issued_at": int(time.time()),
        "job": claimed.job_id,
        "base_model": claimed.model,
        "mechanism": plan.mechanism,
    }
    if plan.mechanism == "none":
        report["statement"] = form.NOT_PRIVATE
    else:
        certified = resolved["certified_datasets"]
        figure = _certificate(plan, done, certified) if checkpoint else None
        report["guarantee"] = _guarantee(plan, certified, figure)
        touched = [charge for charge in claimed.charges if any(_counts(plan, done, charge["datasets"]))]
        report["budgets"] = [_budget(charge, positions, claimed, done, report["guarantee"]) for charge in touched]
    if checkpoint:
        total = sum(part.num_steps for part in plan.parts)
        report["checkpoint"] = {"step_number": sum(done.values()), "num_steps": total}
    ancestors = (resolved.get("base") or {}).get("lineage")
    if ancestors:
        report["lineage"] = _lineage(ancestors, claimed.job_id, report.get("budgets", ()), positions)
    report |= {
        "parts": _parts(plan, done),
        "released": form.released(
            plan.to_dict(),
            "none" if checkpoint else resolved["evaluation"],
            checkpoints=bool(resolved.get("checkpoint_steps")),
        ),
        "treated_as_public": _treated_as_public(claimed),
        "not_covered": form.not_covered(plan.mechanism, plan.privacy_unit.column),
        "digests": {
            "plan": plan.digest(),
            "training_rows": keys.commit(resolved["training_digest"]),
            "validation_rows": keys.commit(resolved["validation_digest"]),
            "rows_method": form.COMMITMENT,
        },
        "plan": plan.to_dict(),
        "runtime": dict(runtime),
        "versions": _versions(),
    }
    return keys.sign(report)


def _counts(plan: PrivacyPlan, executed: Mapping[str, int], datasets: Collection[str]) -> list[int]:
    """Executed steps of each part on these datasets."""
    return [executed[part.name] for part in plan.parts if part.dataset in datasets]


def _certificate(plan: PrivacyPlan, executed: Mapping[str, int], datasets: Collection[Dataset]) -> Figure:
    """ε of the steps until a checkpoint, by the accountant, and on the grid, that certified the plan."""
    assert plan.target_delta is not None
    assert plan.accountant is not None
    event = event_for(plan.executed(executed), datasets)
    return pld_epsilon(event, plan.target_delta, discretization=stated_discretization(plan.accountant))


def _guarantee(plan: PrivacyPlan, datasets: Sequence[str], figure: Figure | None) -> dict[str, Any]:
    """figure: of a checkpoint's steps; None: the plan's own certificate holds."""
    column = plan.privacy_unit.column
    assert plan.accountant is not None
    return {
        "privacy_unit": "record" if column is None else {"column": column},
        "neighboring_relation": plan.neighboring_relation,
        "meaning": form.MEANING,
        "epsilon": plan.epsilon if figure is None else _rounded_up(figure.epsilon),
        "delta": plan.target_delta,
        "target_epsilon": plan.target_epsilon,
        "datasets": list(datasets),
        "accountant": plan.accountant if figure is None else figure.accountant,
        "discretization": stated_discretization(plan.accountant),
        "sampling": form.SAMPLING,
    }


def _budget(
    charge: Mapping[str, Any],
    positions: Sequence[LedgerPosition],
    claimed: Claimed,
    executed: Mapping[str, int],
    guarantee: Mapping[str, Any],
) -> dict[str, Any]:
    """What one budget was charged for the executed steps, in every figure, and where that budget stands."""
    whole, plan = from_json(charge["dp_event"]), claimed.plan
    event = event_for(plan.executed(executed), charge["datasets"])
    assert plan.target_delta is not None
    assert plan.accountant is not None
    position = next(position for position in positions if position.budget_id == charge["budget_id"])
    certified = list(charge["datasets"]) == list(claimed.resolved["certified_datasets"])
    # The figure that the plan was calibrated to, where this is what it was calibrated for.
    interval = stated_discretization(plan.accountant) if certified else None
    figure, *others = pld_epsilons(event, [plan.target_delta, *form.DELTAS], discretization=interval)
    replace_one = pld_epsilon(event, plan.target_delta, "replace_one", figure.discretization)
    powers = attack_power(event, form.FALSE_POSITIVE_RATES, discretization=figure.discretization)
    return {
        "privacy_budget": position.budget_id,
        "datasets": list(charge["datasets"]),
        "dp_event": to_json(event),
        "delta": plan.target_delta,
        "epsilon": guarantee["epsilon"] if certified else _rounded_up(figure.epsilon),
        "accountant": figure.accountant,
        "discretization": figure.discretization,
        "epsilon_replace_one": _rounded_up(replace_one.epsilon),
        "accountant_replace_one": replace_one.accountant,
        "epsilon_at": [{"delta": other.delta, "epsilon": _rounded_up(other.epsilon)} for other in others],
        "attack_power": [
            {"false_positive_rate": rate, "true_positive_rate": _rounded_up(power)}
            for rate, power in zip(form.FALSE_POSITIVE_RATES, powers, strict=True)
        ],
        "limit": {"epsilon": position.accounting.epsilon_limit, "delta": position.accounting.delta},
        "so_far": _so_far(charge, position, pld_epsilon(whole, position.accounting.delta)),
        "ledger": {"sequence": position.sequence, "head_hash": position.head_hash},
    }


def _so_far(charge: Mapping[str, Any], position: LedgerPosition, alone: Figure) -> dict[str, Any]:
    """All that counts against the budget, this job in full among it, at the budget's δ.

    By the filter, since plans are chosen one after another; of a single plan, whose choice saw nothing, its own PLD is
    a certificate too, and the smaller of the two is stated.
    """
    by_filter = position.accounting.epsilon_of(position.rho)
    by_pld = position.plans == 1 and alone.epsilon < by_filter
    return {
        "plans": position.plans,
        "rdp_order": position.accounting.order,
        "rho_of_this_job": charge["rho"],
        "rho": position.rho,
        "epsilon": _rounded_up(alone.epsilon if by_pld else by_filter),
        "accountant": alone.accountant if by_pld else form.filter_name(position.accounting.order),
        "discretization": alone.discretization if by_pld else None,
    }


def _lineage(
    ancestors: Sequence[Mapping[str, Any]],
    job_id: str,
    budgets: Sequence[Mapping[str, Any]],
    positions: Sequence[LedgerPosition],
) -> dict[str, Any]:
    """The jobs that made the base, and what all of them come to together for who is in the rows of several: for each
    budget that this job shares with one of them, by the budget's own filter, since the plans were chosen in turn."""
    composed = []
    for position in positions:
        mine = [budget["dp_event"] for budget in budgets if budget["privacy_budget"] == position.budget_id]
        earlier = {
            entry["job"]: [c["dp_event"] for c in entry["charges"] if c["privacy_budget"] == position.budget_id]
            for entry in ancestors
        }
        shared = {job: events for job, events in earlier.items() if events}
        if mine and shared:
            events = [*mine, *(event for events in shared.values() for event in events)]
            rho = sum(position.accounting.rho_of(from_json(event)) for event in events)
            composed.append(
                {
                    "privacy_budget": position.budget_id,
                    "jobs": [job_id, *shared],
                    "rdp_order": position.accounting.order,
                    "rho": rho,
                    "delta": position.accounting.delta,
                    "epsilon": _rounded_up(position.accounting.epsilon_of(rho)),
                    "accountant": form.filter_name(position.accounting.order),
                }
            )
    return {"meaning": form.LINEAGE, "models": [dict(entry) for entry in ancestors], "composed": composed}


def _parts(plan: PrivacyPlan, executed: Mapping[str, int]) -> list[dict[str, Any]]:
    """The plan's parts as planned, and what came of them."""
    described = []
    for part, planned in zip(plan.parts, plan.to_dict()["parts"], strict=True):
        stated = {**planned, "num_steps": part.num_steps, "executed_steps": executed[part.name]}
        if isinstance(part, SampledGaussian):
            stated["expected_batch_size"] = plan.expected_batch_size(part)
            if plan.mechanism == "dp_sgd" and (together := form.noised_together(planned)) is not None:
                stated["noised_together"] = together
        described.append(stated)
    return described


def _treated_as_public(claimed: Claimed) -> list[dict[str, Any]]:
    """What the guarantee does not protect because it was taken as known."""
    plan, resolved = claimed.plan, claimed.resolved
    task, unit_column = resolved["task"], plan.privacy_unit.column
    columns = {**task["columns"], **({} if unit_column is None else {"privacy_unit": unit_column})}
    source = {"declared": form.DECLARED, "file": form.FROM_FILE, "none": form.NO_CLASSES}[task["labels_source"]]
    options = {
        "task": {"type": task["type"], **task.get("options", {})},
        "phases": list(resolved["phases"]),
        "evaluation": resolved["evaluation"],
        "checkpoint_steps": list(resolved.get("checkpoint_steps", ())),
        "exports": dict(claimed.request.get("export", {})),
        # Of what is new in the model, a head's first weights; sampling and noise have a secret key of the job's own.
        "seed": claimed.seed,
        "training_file": claimed.training_file_id,
        "validation_file": claimed.validation_file_id,
    }
    facts: list[dict[str, Any]] = [
        {"what": form.TRAINING_UNITS, "value": plan.num_units, "source": "the file"},
        {"what": form.COLUMN_NAMES, "value": columns, "source": "the request or the file"},
        {"what": form.CLASSES, "value": list(task["labels"]), "source": source},
        {"what": form.LONGEST_INPUT, "value": task["max_length"], "source": "the request or the defaults"},
        {"what": form.OPTIONS, "value": options, "source": "the request or the defaults"},
    ]
    if plan.num_validation_units:
        value = plan.num_validation_units
        facts.append({"what": form.VALIDATION_UNITS, "value": value, "source": "the file or the split"})
    return facts


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions


def _rounded_up(figure: float) -> float:
    """Six decimals: the same words on every machine, and never less than was certified."""
    return math.ceil(figure * 1e6) / 1e6
