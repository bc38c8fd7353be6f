"""What a budget has left, in ε: derived from ρ and events each time, outside every lock.

Three readings of one ledger, which do not add up, because ε is not additive:
- spent and committed: the filter's ρ_α converted to ε at the budget's δ, which holds however the plans were chosen. Of
  a single plan, whose choice saw nothing, its own PLD is a certificate too, and the smaller of the two is stated.
- remaining: ε at the budget's δ of the largest single release that the filter would still admit.
- if_fixed_in_advance: the certificate of all plans composed, had nobody looked at a model in between.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.budgets import repository
from app.budgets.repository import Usage
from app.budgets.service import accounting_of
from app.budgets.tables import PrivacyBudget
from app.privacy.accountants import pld_epsilon, rdp_epsilon
from app.privacy.calibration import gaussian_delta
from app.privacy.dp_events import compose, from_json, terms
from app.privacy.filter import RenyiBudget

#: Composing one more distinct mechanism costs a PLD half a second; beyond so many the RDP bound, a sum, is stated.
_PLD_TERMS = 8


@dataclass(frozen=True, slots=True)
class Derived:
    """ε, and the accountant that says so."""

    epsilon: float
    accountant: str


@dataclass(frozen=True, slots=True)
class BudgetState:
    """A budget as one transaction saw it; what follows from it is computed later, without the database.

    charged, committed: JSON of the DpEvents that settled jobs executed, and of those and all that is reserved.
    """

    accounting: RenyiBudget
    status: str
    usage: Usage
    charged: tuple[str, ...]
    committed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """All in ε at the budget's δ. reserved: what running and waiting jobs add to spent."""

    spent: Derived
    reserved: float
    remaining: float
    if_fixed_in_advance: Derived


def read(session: Session, budget: PrivacyBudget) -> BudgetState:
    """Everything that the figures need, in a few queries."""
    charged: list[Mapping[str, Any]] = []
    reserved: list[Mapping[str, Any]] = []
    for row in repository.counted(session, budget.id):
        if row.state == "reserved":
            reserved.append(row.dp_event)
        else:
            charged.append(row.charged_event or row.dp_event)
    return BudgetState(
        accounting=accounting_of(budget),
        status=budget.status,
        usage=repository.usage(session, budget.id),
        charged=tuple(map(_text, charged)),
        committed=tuple(map(_text, [*charged, *reserved])),
    )


def derive(state: BudgetState) -> BudgetStatus:
    """The figures; computes PLDs, and remembers them."""
    spent = _adaptive(state.accounting, state.usage.charged, state.charged)
    committed = _adaptive(state.accounting, state.usage.total, state.committed)
    return BudgetStatus(
        spent=spent,
        reserved=max(0.0, committed.epsilon - spent.epsilon),
        remaining=0.0 if state.status != "open" else remaining_epsilon(state.accounting, state.usage.total),
        if_fixed_in_advance=_composed(state.committed, state.accounting.delta),
    )


def remaining_epsilon(accounting: RenyiBudget, used: float) -> float:
    """ε at the budget's δ of the largest single Gaussian release that still fits beside `used` ρ; closed form.

    A plan of DP-SGD of the same ε costs about the same ρ. An untouched budget has all of its limit left: its first plan
    may be admitted by PLD alone.
    """
    if used == 0.0:
        return accounting.epsilon_limit
    rho = accounting.remaining(used)
    if rho == 0.0:
        return 0.0
    sigma = math.sqrt(accounting.order / (2.0 * rho))  # ρ_α of a Gaussian is α / 2σ²
    low, high = 0.0, accounting.epsilon_limit
    if gaussian_delta(sigma, high) > accounting.delta:
        return high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if gaussian_delta(sigma, middle) > accounting.delta else (low, middle)
    return low


def _adaptive(accounting: RenyiBudget, rho: float, events: Sequence[str]) -> Derived:
    name = f"Rényi filter of order {accounting.order}"
    converted = Derived(accounting.epsilon_of(rho), name)
    if len(events) != 1:
        return converted
    certificate = _composed(events, accounting.delta)
    return certificate if certificate.epsilon < converted.epsilon else converted


def _composed(events: Sequence[str], delta: float) -> Derived:
    return _certificate(tuple(sorted(events)), delta)


@functools.lru_cache(maxsize=512)
def _certificate(events: tuple[str, ...], delta: float) -> Derived:
    event = compose(from_json(json.loads(text)) for text in events)
    if not events:
        return Derived(0.0, "nothing was charged")
    if len(terms(event)) > _PLD_TERMS:
        return Derived(rdp_epsilon(event, delta), "RDP, an upper bound")
    figure = pld_epsilon(event, delta)
    return Derived(figure.epsilon, figure.accountant)


def _text(event: Mapping[str, Any]) -> str:
    return json.dumps(event, sort_keys=True)
