"""Checks what a privacy report says of the jobs before its own: of a model that was trained further."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from app.privacy import renyi
from app.privacy import report_format as form
from app.privacy.renyi import Term
from app.privacy.report_claims import (
    CLOSED_FORM,
    require,
    require_agreement,
    require_datasets,
    require_discretization,
    require_keys,
)
from app.privacy.verifier import composed, stored_terms

_LINEAGE_KEYS = {"meaning", "models", "composed"}
_ANCESTOR_KEYS = {
    "model", "job", "base_model", "mechanism", "privacy_unit", "epsilon", "delta", "accountant", "charges",
}  # fmt: skip
_COMPOSED_KEYS = {"privacy_budget", "jobs", "rdp_order", "rho", "delta", "epsilon", "accountant"}


def check_lineage(report: Mapping[str, Any]) -> str:
    """What each earlier job promised, from its events; and for every budget that they share with this one, the sum."""
    lineage = report["lineage"]
    require_keys(lineage, _LINEAGE_KEYS)
    require(lineage["meaning"] == form.LINEAGE, "the lineage is not explained as it has to be")
    require(lineage["models"], "a lineage without a model")
    base, charged = report["base_model"], dict[str, dict[str, list[Term]]]()
    for entry in lineage["models"]:
        require_keys(entry, _ANCESTOR_KEYS)
        require(entry["model"] == base, "a model does not come from the one named after it")
        base = entry["base_model"]
        _ancestor(entry)
        for charge in entry["charges"]:
            terms = stored_terms(charge["dp_event"])
            charged.setdefault(charge["privacy_budget"], {}).setdefault(entry["job"], []).extend(terms)
    shared = [budget for budget in report.get("budgets", ()) if budget["privacy_budget"] in charged]
    require(len(lineage["composed"]) == len(shared), "not every budget that is shared is composed")
    for stated, budget in zip(lineage["composed"], shared, strict=True):
        require_keys(stated, _COMPOSED_KEYS)
        jobs = charged[budget["privacy_budget"]]
        require(stated["privacy_budget"] == budget["privacy_budget"], "another budget than those that are shared")
        require(stated["jobs"] == [report["job"], *jobs], "other jobs than those that were charged")
        require(stated["delta"] == budget["limit"]["delta"], "another δ than the budget's")
        order = stated["rdp_order"]
        require(order == budget["so_far"]["rdp_order"], "another order than the budget's")
        require(stated["accountant"] == form.filter_name(order), "not the accountant that this calls for")
        all_terms = [*stored_terms(budget["dp_event"]), *(term for inner in jobs.values() for term in inner)]
        rho = renyi.total_divergence(all_terms, order)
        require(math.isclose(stated["rho"], rho, rel_tol=CLOSED_FORM, abs_tol=1e-11), "not the jobs' divergence")
        require(rho <= budget["so_far"]["rho"] * (1 + CLOSED_FORM) + 1e-11, "more than the budget was charged")
        found = renyi.epsilon_of_divergence(stated["rho"], order, stated["delta"])
        require_agreement(stated["epsilon"], found, "ε of the lineage", CLOSED_FORM)
    together = ", ".join(f"ε = {stated['epsilon']:g} on {stated['privacy_budget']}" for stated in lineage["composed"])
    return f"{len(lineage['models'])} earlier jobs; together {together or 'on no budget of this job'}"


def _ancestor(entry: Mapping[str, Any]) -> None:
    require(isinstance(entry["model"], str) and isinstance(entry["job"], str), "no model or job is named")
    if entry["mechanism"] == "none":
        require(not entry["charges"] and entry["epsilon"] is None, "charges without a mechanism")
        return
    require(entry["mechanism"] == "dp_sgd" and entry["charges"], "an unknown mechanism, or nothing was charged")
    require(entry["privacy_unit"] == "record" or entry["privacy_unit"].keys() == {"column"}, "no privacy unit")
    named = re.search(r", discretization ([0-9.e-]+), pessimistic$", entry["accountant"])
    require(named, "not a known accountant")
    assert named is not None
    interval = float(named[1])
    require_discretization(entry["accountant"], interval)
    for charge in entry["charges"]:
        require_keys(charge, {"privacy_budget", "datasets", "dp_event"})
        require_datasets(charge["datasets"])
    # The first charge is to the training rows' budget: what the job's own ε was certified for.
    found = composed(stored_terms(entry["charges"][0]["dp_event"]), interval).epsilon(entry["delta"])
    require_agreement(entry["epsilon"], found, f"ε of {entry['job']}")
