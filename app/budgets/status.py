"""What a budget has left, in ε: derived from ρ and events each time, outside every lock.

Readings of one ledger, which do not add up, because ε is not additive:
- spent and committed: the filter's ρ_α converted to ε at the budget's δ, which holds however the plans were chosen. Of
  a single plan, whose choice saw nothing, its own PLD is a certificate too, and the smaller of the two is stated.
- remaining: ε at the budget's δ of the largest single release that the filter would still admit.
- if_fixed_in_advance: the certificate of all plans composed, had nobody looked at a model in between.

A figure is remembered under the ledger's head, of which it is a function.
"""

from __future__ import annotations

import functools
import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.budgets import repository
from app.budgets.repository import Usage
from app.budgets.service import accounting_of, status_of
from app.budgets.tables import PrivacyBudget
from app.privacy.accountants import interval_for, pld_epsilons, rdp_epsilon
from app.privacy.calibration import gaussian_delta
from app.privacy.dp_events import compose, from_json, terms
from app.privacy.filter import UNIT, RenyiBudget
from app.privacy.renyi import epsilon_of_divergence

#: Composing one more distinct mechanism costs a PLD half a second; beyond so many the RDP bound, a sum, is stated.
_PLD_TERMS = 8

#: ε is also told at these δ.
DELTAS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9)

_REMEMBERED_BUDGETS = 1024
_remembered: dict[tuple[str, str], BudgetStatus] = {}
#: One PLD at a time: a second request for the same budget finds it done.
_deriving = threading.Lock()


@dataclass(frozen=True, slots=True)
class Derived:
    """ε, and the accountant that says so."""

    epsilon: float
    accountant: str


@dataclass(frozen=True, slots=True)
class AtDelta:
    """The same at another δ. if_fixed_in_advance: None where that is not known."""

    delta: float
    spent: float
    if_fixed_in_advance: float | None


@dataclass(frozen=True, slots=True)
class LastPlan:
    """The newest plan that was admitted."""

    job_id: str
    rho: float
    event: str


@dataclass(frozen=True, slots=True)
class BudgetState:
    """A budget as one transaction saw it; what follows from it is computed later, without the database.

    charged, committed: JSON of the DpEvents that settled jobs executed, and of those and all that is reserved.
    reconciled: whether something was charged of which only ρ is known.
    """

    head: str
    accounting: RenyiBudget
    status: str
    usage: Usage
    charged: tuple[str, ...]
    committed: tuple[str, ...]
    reconciled: bool
    last: LastPlan | None


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """All in ε at the budget's δ. reserved: what running and waiting jobs add to spent.

    if_fixed_in_advance: None where a reconciliation charged events that nobody knows.
    more_like_last: how many plans of the last one's cost would still be admitted.
    """

    usage: Usage
    spent: Derived
    reserved: float
    remaining: float
    rho_remaining: float
    if_fixed_in_advance: Derived | None
    at: tuple[AtDelta, ...]
    last: LastPlan | None
    more_like_last: int


def remembered(budget: PrivacyBudget) -> BudgetStatus | None:
    """What was derived before from the same head, without a look at the reservations."""
    return _remembered.get((budget.head_hash, status_of(budget)))


def read(session: Session, budget: PrivacyBudget) -> BudgetState:
    """Everything that the figures need, in a few queries."""
    charged: list[Mapping[str, Any]] = []
    reserved: list[Mapping[str, Any]] = []
    for row in repository.counted(session, budget.id):
        if row.state == "reserved":
            reserved.append(row.dp_event)
        else:
            charged.append(row.charged_event or row.dp_event)
    last = repository.last_admitted(session, budget.id)
    return BudgetState(
        head=budget.head_hash,
        accounting=accounting_of(budget),
        status=status_of(budget),
        usage=repository.usage(session, budget.id),
        charged=tuple(map(_text, charged)),
        committed=tuple(map(_text, [*charged, *reserved])),
        reconciled=budget.rho_reconciled > 0.0,
        last=None if last is None else LastPlan(last.job_id, last.rho, _text(last.dp_event)),
    )


def derive(state: BudgetState) -> BudgetStatus:
    """The figures; computes PLDs, and remembers them."""
    key = (state.head, state.status)
    with _deriving:
        if key not in _remembered:
            if len(_remembered) >= _REMEMBERED_BUDGETS:
                del _remembered[next(iter(_remembered))]
            _remembered[key] = _derive(state)
        return _remembered[key]


def _derive(state: BudgetState) -> BudgetStatus:
    accounting, usage = state.accounting, state.usage
    deltas = (accounting.delta, *DELTAS)
    spent = _adaptive(accounting, usage.charged, state.charged, state.reconciled, deltas)
    committed = _adaptive(accounting, usage.total, state.committed, state.reconciled, deltas)[0]
    fixed = None if state.reconciled else _composed(state.committed, deltas)
    is_open = state.status == "open"
    return BudgetStatus(
        usage=usage,
        spent=spent[0],
        reserved=max(0.0, committed.epsilon - spent[0].epsilon),
        remaining=remaining_epsilon(accounting, usage.total) if is_open else 0.0,
        rho_remaining=accounting.remaining(usage.total) if is_open else 0.0,
        if_fixed_in_advance=None if fixed is None else fixed[0],
        at=tuple(
            AtDelta(delta, spent[number].epsilon, None if fixed is None else fixed[number].epsilon)
            for number, delta in enumerate(deltas)
            if number
        ),
        last=state.last,
        more_like_last=_more_like(state.last, accounting, usage.total) if is_open and state.last is not None else 0,
    )


def _more_like(last: LastPlan, accounting: RenyiBudget, used: float) -> int:
    if last.rho == 0.0:
        return 0  # there is no end to them
    fitting = int(accounting.remaining(used) / UNIT) // int(last.rho / UNIT)
    if fitting == 0 and used == 0.0:
        # As the first plan, its PLD alone may admit it.
        return int(accounting.admits_first(from_json(json.loads(last.event))))
    return fitting


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


def _adaptive(
    accounting: RenyiBudget, rho: float, events: Sequence[str], reconciled: bool, deltas: tuple[float, ...]
) -> list[Derived]:
    """At each δ. The filter's (α, ρ) holds at all of them, though its α was chosen for the budget's own."""
    name = f"Rényi filter of order {accounting.order}"
    converted = [
        accounting.epsilon_of(rho) if delta == accounting.delta else epsilon_of_divergence(rho, accounting.order, delta)
        for delta in deltas
    ]
    figures = [Derived(epsilon, name) for epsilon in converted]
    if len(events) != 1 or reconciled:
        return figures
    certificates = _composed(events, deltas)
    return [min(pair, key=lambda figure: figure.epsilon) for pair in zip(figures, certificates, strict=True)]


def _composed(events: Sequence[str], deltas: tuple[float, ...]) -> tuple[Derived, ...]:
    return _certificates(tuple(sorted(events)), deltas)


@functools.lru_cache(maxsize=512)
def _certificates(events: tuple[str, ...], deltas: tuple[float, ...]) -> tuple[Derived, ...]:
    """Of all the events composed, at each δ; the first δ decides how finely."""
    event = compose(from_json(json.loads(text)) for text in events)
    mechanisms = terms(event)
    if not mechanisms:
        return tuple(Derived(0.0, "nothing was charged") for _ in deltas)
    if len(mechanisms) > _PLD_TERMS:
        return tuple(Derived(rdp_epsilon(event, delta), "RDP, an upper bound") for delta in deltas)
    guess = max(rdp_epsilon(event, deltas[0]), 1e-3)
    interval = interval_for(guess, deltas[0], sum(mechanism.count for mechanism in mechanisms))
    figures = pld_epsilons(event, deltas, discretization=interval)
    return tuple(Derived(figure.epsilon, figure.accountant) for figure in figures)


def _text(event: Mapping[str, Any]) -> str:
    return json.dumps(event, sort_keys=True)
