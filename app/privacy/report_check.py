"""Checks a privacy report against itself, offline: every figure from the events, every part against the plan.

The accountants are `app.privacy.verifier`'s own; NumPy is all that is needed. What no arithmetic can tell (which job,
which rows, which place in a ledger) only the signature vouches for, see `app.signing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.privacy import renyi
from app.privacy import report_format as form
from app.privacy.report_claims import (
    CLOSED_FORM,
    ROUNDED,
    Refused,
    is_hash,
    planned_terms,
    require,
    require_agreement,
    require_datasets,
    require_discretization,
    require_keys,
)
from app.privacy.report_lineage import check_lineage
from app.privacy.verifier import CLAIM_TOLERANCE, composed, stored_terms

_KEYS = {
    "format", "issued_at", "job", "base_model", "mechanism", "parts", "released", "treated_as_public", "not_covered",
    "digests", "plan", "runtime", "versions", "signature",
}  # fmt: skip
_PRIVATE_KEYS = _KEYS | {"guarantee", "budgets"}
_GUARANTEE_KEYS = {
    "privacy_unit", "neighboring_relation", "meaning", "epsilon", "delta", "target_epsilon", "datasets", "accountant",
    "discretization", "sampling",
}  # fmt: skip
_BUDGET_KEYS = {
    "privacy_budget", "datasets", "dp_event", "delta", "epsilon", "accountant", "discretization", "epsilon_replace_one",
    "accountant_replace_one", "epsilon_at", "attack_power", "limit", "so_far", "ledger",
}  # fmt: skip
_SO_FAR_KEYS = {"plans", "rdp_order", "rho_of_this_job", "rho", "epsilon", "accountant", "discretization"}

#: What a report may take as public, and where it may have it from.
_FACTS = {
    form.TRAINING_UNITS: {"the file"},
    form.VALIDATION_UNITS: {"the file or the split"},
    form.COLUMN_NAMES: {"the request or the file"},
    form.CLASSES: {form.DECLARED, form.FROM_FILE, form.NO_CLASSES},
    form.LONGEST_INPUT: {"the request or the defaults"},
    form.OPTIONS: {"the request or the defaults"},
}

#: Fields of plans that are fractions: a tool that rewrites JSON may have dropped their ".0".
_FRACTIONS = frozenset(
    {
        "sample_rate", "noise_multiplier", "max_grad_norm", "sensitivity", "target_epsilon", "target_delta", "epsilon",
        "bound", "share", "target_quantile", "learning_rate",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its name, what was found, and whether it holds."""

    name: str
    found: str
    holds: bool


def check_report(report: Mapping[str, Any]) -> list[Check]:
    """Every check, in the order of the report. It is to be refused unless all of them hold."""
    checks = [_run("form", _form, report)]
    if not checks[0].holds:
        return checks
    checks.append(_run("plan", _plan, report))
    checks.append(_run("public", _public, report))
    if report["mechanism"] == "dp_sgd":
        checks.append(_run("guarantee", _guarantee, report))
        for number in range(len(report["budgets"])):
            for name, check in _BUDGET_CHECKS.items():
                checks.append(_run(f"budget {number + 1}: {name}", check, report, report["budgets"][number]))
    if "lineage" in report:
        checks.append(_run("lineage", check_lineage, report))
    return checks


def _run(name: str, check: Callable[..., str], *arguments: Any) -> Check:
    try:
        return Check(name, check(*arguments), True)
    except Refused as refused:
        return Check(name, str(refused), False)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError):
        return Check(name, "not of a report's form", False)


def _form(report: Mapping[str, Any]) -> str:
    require(report.get("format") == form.FORMAT, f"not a report of the form {form.FORMAT}")
    mechanism = report["mechanism"]
    require(mechanism in ("dp_sgd", "none"), "an unknown mechanism")
    if "checkpoint" in report:
        require_keys(report["checkpoint"], {"step_number", "num_steps"})
        report = {key: value for key, value in report.items() if key != "checkpoint"}
    if mechanism == "dp_sgd":
        require_keys(report, _PRIVATE_KEYS | (report.keys() & {"lineage"}))
        require_keys(report["guarantee"], _GUARANTEE_KEYS)
        for budget in report["budgets"]:
            require_keys(budget, _BUDGET_KEYS)
            require_keys(budget["so_far"], _SO_FAR_KEYS)
            require_keys(budget["limit"], {"epsilon", "delta"})
            require_keys(budget["ledger"], {"sequence", "head_hash"})
    else:
        require_keys(report, _KEYS | {"statement"} | (report.keys() & {"lineage"}))
        require(report["statement"] == form.NOT_PRIVATE, "the statement is not the form's")
    require(type(report["issued_at"]) is int, "no time of issue")
    require(isinstance(report["job"], str) and isinstance(report["base_model"], str), "no job or base model is named")
    require_keys(report["digests"], {"plan", "training_rows", "validation_rows", "rows_method"})
    column = report["plan"]["privacy_unit"]["column"]
    require(
        report["not_covered"] == form.not_covered(mechanism, column),
        "what is not covered is not stated as it has to be",
    )
    return form.FORMAT


def _plan(report: Mapping[str, Any]) -> str:
    plan, digests = report["plan"], report["digests"]
    require(digests["plan"] in (form.digest(plan), form.digest(_as_fractions(plan))), "the plan is not its digest's")
    for name in ("training_rows", "validation_rows"):
        require(digests[name] is None or is_hash(digests[name]), f"{name} is no commitment")
    require(digests["training_rows"] is not None, "no commitment to the training rows")
    require(digests["rows_method"] == form.COMMITMENT, "an unknown kind of commitment")
    require(plan["mechanism"] == report["mechanism"], "the plan is of another mechanism")
    require(len(report["parts"]) == len(plan["parts"]) > 0, "not the plan's parts")
    done = _executed(report)
    for stated, planned in zip(report["parts"], plan["parts"], strict=True):
        if plan["mechanism"] == "dp_sgd":
            _require_bounded(planned)
        expected = {**planned, "num_steps": planned.get("num_steps", 1), "executed_steps": done[planned["name"]]}
        if planned["kind"] == "sampled_gaussian":
            expected["expected_batch_size"] = planned["sample_rate"] * plan["num_units"]
            if plan["mechanism"] == "dp_sgd" and (together := form.noised_together(planned)) is not None:
                expected["noised_together"] = together
                _require_one_mechanism(together, planned)
        require(dict(stated) == expected, f"part {planned['name']} is not as planned, or not executed in full")
    until = f", until step {report['checkpoint']['step_number']}" if "checkpoint" in report else ""
    return f"{len(plan['parts'])} parts, executed as planned{until}"


def _executed(report: Mapping[str, Any]) -> dict[str, int]:
    """Steps of each part that the report speaks about: all of them, or, of a checkpoint, what comes first."""
    planned = {part["name"]: part.get("num_steps", 1) for part in report["plan"]["parts"]}
    if "checkpoint" not in report:
        return planned
    stated, whole = report["checkpoint"], sum(planned.values())
    done = {part["name"]: part["executed_steps"] for part in report["parts"]}
    require(all(type(count) is int for count in done.values()), "a part's steps are no number")
    require(done.keys() == planned.keys() and form.in_order(report["plan"]["parts"], done), "not a plan's first steps")
    require(stated == {"step_number": sum(done.values()), "num_steps": whole}, "the checkpoint is of other steps")
    require(type(stated["step_number"]) is int and stated["step_number"] < whole, "a checkpoint is before the end")
    return done


def _require_bounded(planned: Mapping[str, Any]) -> None:
    """Noise is over a sensitivity: a unit's contribution has to have a bound. A plan without one is none of ours."""
    if planned["kind"] == "gaussian_release":
        bounded = planned["sensitivity"] > 0.0
    else:
        clipping, counts = planned["clipping"], planned.get("quantile") is not None
        bounded = clipping in form.CLIPPINGS and planned["max_grad_norm"] > 0.0 and counts == (clipping == "adaptive")
    require(bounded, f"part {planned['name']} bounds no unit's contribution")


def _require_one_mechanism(together: Sequence[Mapping[str, Any]], planned: Mapping[str, Any]) -> None:
    """Parts of one noised vector are one Gaussian mechanism: σ⁻² = Σ (Δ_j / s_j)²."""
    precision = math.fsum(held["noise_multiplier"] ** -2 for held in together)
    require(
        all(held["sensitivity"] > 0.0 for held in together)
        and math.isclose(precision, planned["noise_multiplier"] ** -2, rel_tol=CLOSED_FORM),
        f"what part {planned['name']} noises together is not one mechanism of its noise multiplier",
    )


def _public(report: Mapping[str, Any]) -> str:
    facts: dict[str, Any] = {}
    for fact in report["treated_as_public"]:
        require_keys(fact, {"what", "value", "source"})
        require(fact["source"] in _FACTS.get(fact["what"], ()), "a public fact of unknown kind or source")
        facts[fact["what"]] = fact["value"]
    plan = report["plan"]
    require(len(facts) == len(report["treated_as_public"]), "a public fact is stated twice")
    required = _FACTS.keys() - ({form.VALIDATION_UNITS} if not plan["num_validation_units"] else set())
    require(facts.keys() == required, "not all of what was treated as public is stated")
    require(facts[form.TRAINING_UNITS] == plan["num_units"], "another number of units than the plan's")
    require(facts.get(form.VALIDATION_UNITS, 0) == plan["num_validation_units"], "another number of validation units")
    options = facts[form.OPTIONS]
    evaluation = "none" if "checkpoint" in report else options["evaluation"]
    # Reports of before this was told have no steps.
    released = form.released(plan, evaluation, checkpoints=bool(options.get("checkpoint_steps")))
    require(report["released"] == released, "what was released is not what was asked for")
    return f"{len(facts)} facts"


def _guarantee(report: Mapping[str, Any]) -> str:
    stated, plan = report["guarantee"], report["plan"]
    column = plan["privacy_unit"]["column"]
    expected = {
        "privacy_unit": "record" if column is None else {"column": column},
        "neighboring_relation": plan["neighboring_relation"],
        "meaning": form.MEANING,
        "sampling": form.SAMPLING,
        "delta": plan["target_delta"],
        "target_epsilon": plan["target_epsilon"],
    }
    if "checkpoint" not in report:
        expected |= {"epsilon": plan["epsilon"], "accountant": plan["accountant"]}
    for key, value in expected.items():
        require(stated[key] == value, f"{key} is not the plan's")
    require(plan["neighboring_relation"] == "zero_out", "an unknown neighbouring relation")
    require(stated["epsilon"] <= stated["target_epsilon"], "more than the target was spent")
    require_discretization(stated["accountant"], stated["discretization"])
    require_datasets(stated["datasets"])
    terms = planned_terms(plan, stated["datasets"], _executed(report))
    found = composed(terms, stated["discretization"]).epsilon(stated["delta"])
    require_agreement(stated["epsilon"], found, "ε")
    return f"ε = {stated['epsilon']:g} at δ = {stated['delta']:g}; recomputed {found:.6g}"


def _event(report: Mapping[str, Any], budget: Mapping[str, Any]) -> str:
    require_datasets(budget["datasets"])
    terms = stored_terms(budget["dp_event"])
    planned = planned_terms(report["plan"], budget["datasets"], _executed(report))
    require(terms == planned != (), "the event is not the plan's")
    require(budget["delta"] == report["plan"]["target_delta"], "another δ than the job's")
    require(isinstance(budget["privacy_budget"], str), "no budget is named")
    return f"{sum(term.count for term in terms)} noised sums, as planned"


def _epsilon(report: Mapping[str, Any], budget: Mapping[str, Any]) -> str:
    if budget["datasets"] == report["guarantee"]["datasets"]:
        for key in ("epsilon", "accountant", "discretization"):
            require(budget[key] == report["guarantee"][key], f"{key} is not the guarantee's")
    require_discretization(budget["accountant"], budget["discretization"])
    terms = stored_terms(budget["dp_event"])
    profile, rdp = composed(terms, budget["discretization"]), renyi.rdp_epsilon(terms, budget["delta"])
    found = profile.epsilon(budget["delta"])
    require_agreement(budget["epsilon"], found, "ε")
    require([point["delta"] for point in budget["epsilon_at"]] == list(form.DELTAS), "not the form's list of δ")
    for point in budget["epsilon_at"]:
        require_keys(point, {"delta", "epsilon"})
        require_agreement(point["epsilon"], profile.epsilon(point["delta"]), f"ε at δ = {point['delta']:g}")
    return f"ε = {budget['epsilon']:g} at δ = {budget['delta']:g}; recomputed {found:.6g}, at most {rdp:.6g} by RDP"


def _replace_one(_report: Mapping[str, Any], budget: Mapping[str, Any]) -> str:
    require_discretization(budget["accountant_replace_one"], budget["discretization"], "replace_one")
    terms = stored_terms(budget["dp_event"])
    found = composed(terms, budget["discretization"], "replace_one").epsilon(budget["delta"])
    require_agreement(budget["epsilon_replace_one"], found, "ε under replace-one")
    return f"ε = {budget['epsilon_replace_one']:g}; recomputed {found:.6g}"


def _attack_power(_report: Mapping[str, Any], budget: Mapping[str, Any]) -> str:
    rates = [point["false_positive_rate"] for point in budget["attack_power"]]
    require(rates == list(form.FALSE_POSITIVE_RATES), "not the form's false-positive rates")
    profile = composed(stored_terms(budget["dp_event"]), budget["discretization"])
    for point in budget["attack_power"]:
        require_keys(point, {"false_positive_rate", "true_positive_rate"})
        found = profile.true_positive_rate(point["false_positive_rate"])
        require_agreement(point["true_positive_rate"], found, "true-positive rate")
    return ", ".join(f"{p['true_positive_rate']:.3g} at {p['false_positive_rate']:g}" for p in budget["attack_power"])


def _so_far(report: Mapping[str, Any], budget: Mapping[str, Any]) -> str:
    """The filter's sum, converted; of a single plan, whose choice saw nothing, the lesser of that and its PLD.

    The job counts in full, at a checkpoint too.
    """
    stated, limit = budget["so_far"], budget["limit"]
    terms, order = planned_terms(report["plan"], budget["datasets"]), stated["rdp_order"]
    require(type(order) is int and 2 <= order <= 10_000, "an order that no filter has")
    mine = renyi.total_divergence(terms, order)
    require(
        math.isclose(stated["rho_of_this_job"], mine, rel_tol=CLOSED_FORM, abs_tol=1e-11), "not this job's divergence"
    )
    require(type(stated["plans"]) is int and stated["plans"] >= 1, "this job is not among the plans")
    require(stated["rho"] >= stated["rho_of_this_job"], "less was spent than this job alone")
    alone = stated["plans"] == 1
    require(not alone or stated["rho"] == stated["rho_of_this_job"], "one plan, but more than this job was spent")
    if alone and stated["discretization"] is not None:
        require_discretization(stated["accountant"], stated["discretization"])
        epsilon, tolerance = composed(terms, stated["discretization"]).epsilon(limit["delta"]), CLAIM_TOLERANCE
    else:
        require(stated["accountant"] == form.filter_name(order), "not the accountant that this calls for")
        require(stated["discretization"] is None, "a filter has no discretization")
        epsilon, tolerance = renyi.epsilon_of_divergence(stated["rho"], order, limit["delta"]), CLOSED_FORM
    require_agreement(stated["epsilon"], epsilon, "ε of the budget so far", tolerance)
    require(stated["epsilon"] <= limit["epsilon"] + ROUNDED, "the budget's limit was passed")
    return f"{stated['plans']} plans, ε = {stated['epsilon']:g} of {limit['epsilon']:g} at δ = {limit['delta']:g}"


def _ledger(_report: Mapping[str, Any], budget: Mapping[str, Any]) -> str:
    ledger = budget["ledger"]
    # The first entry opens the budget, a later one reserves for this job.
    require(type(ledger["sequence"]) is int and ledger["sequence"] >= 2, "no place in a ledger")
    require(is_hash(ledger["head_hash"]), "no hash of a ledger's entry")
    return f"entry {ledger['sequence']}, {ledger['head_hash'][:12]}…"


_BUDGET_CHECKS: dict[str, Callable[..., str]] = {
    "event": _event,
    "epsilon": _epsilon,
    "replace-one": _replace_one,
    "attack power": _attack_power,
    "so far": _so_far,
    "ledger": _ledger,
}


def _as_fractions(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: float(inner) if key in _FRACTIONS and type(inner) is int else _as_fractions(inner)
            for key, inner in value.items()
        }
    return [_as_fractions(inner) for inner in value] if isinstance(value, list) else value
