"""What a privacy report states, against what it has to be: what all checks of one are made of."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from app.privacy.renyi import Term
from app.privacy.verifier import CLAIM_TOLERANCE, Relation

#: Figures are rounded up to six decimals. Closed forms agree but for another libm's last digits.
ROUNDED = 1e-6
CLOSED_FORM = 1e-9


class Refused(Exception):
    """The text says what does not hold."""


def require(condition: Any, problem: str) -> None:
    """Raises Refused with that text where the condition does not hold."""
    if not condition:
        raise Refused(problem)


def require_keys(value: Mapping[str, Any], expected: set[str]) -> None:
    """No field more, none less."""
    require(value.keys() == expected, "a field is missing, or there is one too many")


def is_hash(text: Any) -> bool:
    """Whether it is a SHA-256 in hexadecimal."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None


def require_datasets(datasets: Any) -> None:
    """Datasets of a plan, in order."""
    require(datasets in (["training"], ["validation"], ["training", "validation"]), "unknown datasets")


def require_discretization(accountant: str, discretization: float, relation: Relation = "zero_out") -> None:
    """The accountant is a PLD of that relation and discretization, by its name."""
    tail = f", {relation}, discretization {discretization:g}, pessimistic"
    require(re.fullmatch(r"PLD, dp-accounting [0-9]\S*", accountant.removesuffix(tail)), "not a known accountant")
    require(accountant.endswith(tail), "the accountant names another relation or discretization")


def require_agreement(stated: float, found: float, what: str, tolerance: float = CLAIM_TOLERANCE) -> None:
    """At one discretization two sound accountants differ by rounding only."""
    require(type(stated) in (int, float) and math.isfinite(found), f"{what} cannot be recomputed")
    slack = tolerance * found + CLOSED_FORM
    require(-slack <= stated - found <= slack + ROUNDED, f"{what} is stated as {stated:g}, but recomputed as {found:g}")


def planned_terms(
    plan: Mapping[str, Any], datasets: Sequence[str], executed: Mapping[str, int] | None = None
) -> tuple[Term, ...]:
    """What the plan's parts on these datasets come to, as `stored_terms` has it. executed: not all, but these steps."""
    counts: Counter[tuple[float, float]] = Counter()
    for part in plan["parts"]:
        if part["dataset"] in datasets:
            sigma, rate, steps = part["noise_multiplier"], part.get("sample_rate", 1.0), part.get("num_steps", 1)
            require(type(steps) is int and steps >= 1 and 0 < rate <= 1 and 0 < sigma < math.inf, "a part is not sane")
            if done := steps if executed is None else executed[part["name"]]:
                counts[(float(rate), float(sigma))] += done
    return tuple(Term(rate, sigma, count) for (rate, sigma), count in sorted(counts.items()))
