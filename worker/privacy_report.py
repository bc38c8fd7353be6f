"""privacy_report.json: what the job's guarantee is, how it was made, what was taken as public, what is not covered.

Built from the plan that was executed and from the ledger, never from the request. ε under replace-one is computed from
the same events; it is larger, and is what a reader needs who compares with papers of that relation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.jobs.lifecycle import Claimed
from app.privacy.accountants import pld_epsilon
from app.privacy.dp_events import from_json
from app.privacy.plan import GaussianRelease, Part, PrivacyPlan, SampledGaussian

FORMAT = "privtune.privacy_report/1"

#: Fixed texts: what no (ε, δ) here speaks about.
NOT_COVERED = (
    "When the job ran, how long it took, its estimated finish, and, had it failed, when and with which code.",
    "People who have records under another budget too: each budget's limit speaks about its own records alone.",
    "A person with several records, as a whole: each record is protected by itself.",
    "The lowest bits of noise drawn in floating point (arXiv 2112.05307).",
    "Whoever holds both a backup of the service's database from the time of the job and its secret key.",
)


@dataclass(frozen=True, slots=True)
class LedgerPosition:
    """Where a budget's ledger stood when the report was written; the job's reservation lies at or before it."""

    budget_id: str
    sequence: int
    head_hash: str
    epsilon_limit: float
    delta: float


def build(
    claimed: Claimed, executed: Mapping[str, int], positions: Sequence[LedgerPosition], runtime: Mapping[str, Any]
) -> dict[str, Any]:
    """The report of a finished job. Takes seconds of CPU (PLDs are composed): never inside a transaction that writes.

    Raises ValueError where the executed steps are not the plan's: there is no report of half a job.
    """
    plan, resolved = claimed.plan, claimed.resolved
    if plan.executed(executed).parts != plan.parts:
        raise ValueError("the report of a finished job is of its whole plan")
    report: dict[str, Any] = {
        "format": FORMAT,
        "job": claimed.job_id,
        "base_model": claimed.model,
        "mechanism": plan.mechanism,
    }
    if plan.mechanism == "none":
        report["statement"] = "Trained without differential privacy, on data that was declared public."
    else:
        report["guarantee"] = _guarantee(plan)
        report["budgets"] = [_budget(charge, positions, plan) for charge in claimed.charges]
    report |= {
        "parts": [_part(part, plan, executed) for part in plan.parts],
        "released": ["the model's weights", "numbers of steps", *_metrics_released(resolved["evaluation"])],
        "treated_as_public": _treated_as_public(plan, resolved),
        "not_covered": list(NOT_COVERED) if plan.mechanism != "none" else [],
        "digests": {
            "plan": plan.digest(),
            "training_rows": resolved["training_digest"],
            "validation_rows": resolved.get("validation_digest"),
        },
        "plan": plan.to_dict(),
        "runtime": dict(runtime),
    }
    return report


def _guarantee(plan: PrivacyPlan) -> dict[str, Any]:
    column = plan.privacy_unit.column
    return {
        "privacy_unit": "record" if column is None else {"column": column},
        "neighboring_relation": plan.neighboring_relation,
        "meaning": "The records of one unit are replaced by nothing; the number of units is public and fixed.",
        "epsilon": plan.epsilon,
        "delta": plan.target_delta,
        "target_epsilon": plan.target_epsilon,
        "accountant": plan.accountant,
        "sampling": "Poisson: each unit is in each batch independently, with the part's sample rate",
    }


def _budget(charge: Mapping[str, Any], positions: Sequence[LedgerPosition], plan: PrivacyPlan) -> dict[str, Any]:
    """What one budget was charged, at the job's δ, under both relations."""
    event = from_json(charge["dp_event"])
    assert plan.target_delta is not None
    position = next(position for position in positions if position.budget_id == charge["budget_id"])
    zero_out = pld_epsilon(event, plan.target_delta)
    replace_one = pld_epsilon(event, plan.target_delta, "replace_one")
    return {
        "privacy_budget": position.budget_id,
        "datasets": list(charge["datasets"]),
        "epsilon": zero_out.epsilon,
        "epsilon_replace_one": replace_one.epsilon,
        "delta": plan.target_delta,
        "accountant": zero_out.accountant,
        "accountant_replace_one": replace_one.accountant,
        "dp_event": charge["dp_event"],
        "ledger": {"sequence": position.sequence, "head_hash": position.head_hash},
        "limit": {"epsilon": position.epsilon_limit, "delta": position.delta},
    }


def _part(part: Part, plan: PrivacyPlan, executed: Mapping[str, int]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": part.name,
        "kind": part.kind,
        "dataset": part.dataset,
        "noise_multiplier": part.noise_multiplier,
        "num_steps": part.num_steps,
        "executed_steps": executed[part.name],
    }
    match part:
        case SampledGaussian():
            described |= {
                "sample_rate": part.sample_rate,
                "expected_batch_size": plan.expected_batch_size(part),
                "max_grad_norm": part.max_grad_norm,
                "clipping": part.clipping,
            }
        case GaussianRelease():
            described |= {"sensitivity": part.sensitivity}
    return described


def _metrics_released(evaluation: str) -> list[str]:
    return {
        "private": ["metrics, computed from confusion counts that were noised and charged"],
        "public": ["metrics, exact, on data declared public"],
        "none": [],
    }[evaluation]


def _treated_as_public(plan: PrivacyPlan, resolved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the guarantee does not protect because it was taken as known."""
    task = resolved["task"]
    facts: list[dict[str, Any]] = [
        {"what": "number of training units", "value": plan.num_units, "source": "the file"},
        {"what": "names of the columns read", "value": dict(task["columns"]), "source": "the request or the file"},
        {
            "what": "list of classes",
            "value": list(task["labels"]),
            "source": "declared in the request" if task["labels_source"] == "declared" else "taken from the file",
        },
        {"what": "longest input, in tokens", "value": task["max_length"], "source": "the request or the defaults"},
    ]
    if plan.num_validation_units:
        value = plan.num_validation_units
        facts.append({"what": "number of validation units", "value": value, "source": "the file or the split"})
    return facts
