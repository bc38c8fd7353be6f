"""ε of an event: PLD certifies, RDP gives a second upper bound and the budget's ρ.

Every figure is an upper bound: PLDs are discretized pessimistically ("Connect the Dots", Doroshenko et al. 2022), and
the discretization is stated with the figure. The relation is zero_out (dp-accounting's REPLACE_SPECIAL) unless said
otherwise. GDP's central limit approximation is not an upper bound and is never used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import dp_accounting
import numpy as np
from dp_accounting import DpEvent
from dp_accounting.pld import PLDAccountant

from app.privacy import renyi, trade_off
from app.privacy.dp_events import terms
from app.privacy.renyi import Term

Relation = Literal["zero_out", "replace_one"]

_RELATIONS = {
    "zero_out": dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
    "replace_one": dp_accounting.NeighboringRelation.REPLACE_ONE,
}

#: The PLD is composed by FFT in float64, whose rounding leaves up to about 1.4e-12 of stray mass (measured at 20,000
#: steps). That much and a margin is taken off δ before ε is read; below MIN_DELTA it would no longer be small.
FFT_ALLOWANCE = 5e-12
MIN_DELTA = 1e-10

#: Discretization intervals, coarsest first. Below the last one float64 cancellation costs more than the grid gains.
_INTERVALS = (1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5)


@dataclass(frozen=True, slots=True)
class Figure:
    """An upper bound on ε at δ, with everything needed to compute it again."""

    epsilon: float
    delta: float
    relation: Relation
    accountant: str
    discretization: float


def accountant_name(discretization: float, relation: Relation = "zero_out") -> str:
    """The words under which a PLD figure is stated, for instance in a report."""
    return f"PLD, dp-accounting {version('dp-accounting')}, {relation}, discretization {discretization:g}, pessimistic"


def stated_discretization(accountant: str) -> float:
    """The discretization that `accountant_name` put into a name. Raises ValueError for any other text."""
    found = re.search(r", discretization (\S+), pessimistic$", accountant)
    if found is None:
        raise ValueError("not the name of a PLD accountant")
    return float(found[1])


def pld_epsilon(
    event: DpEvent, delta: float, relation: Relation = "zero_out", discretization: float | None = None
) -> Figure:
    """The smallest ε that the PLD of `event` certifies at `delta`; discretization None chooses one by the event."""
    return pld_epsilons(event, [delta], relation, discretization)[0]


def pld_epsilons(
    event: DpEvent, deltas: Sequence[float], relation: Relation = "zero_out", discretization: float | None = None
) -> list[Figure]:
    """`pld_epsilon` at several δ of one event, which is composed once."""
    for delta in deltas:
        require_delta(delta)
    parts = terms(event)
    interval = discretization or _interval_of(parts, min(deltas))
    accountant = _composed(parts, relation, interval)
    name = accountant_name(interval, relation)
    return [
        Figure(accountant.get_epsilon(target_delta=delta - FFT_ALLOWANCE), delta, relation, name, interval)
        for delta in deltas
    ]


def pld_delta(
    event: DpEvent, epsilon: float, relation: Relation = "zero_out", discretization: float | None = None
) -> float:
    """The smallest δ that the PLD of `event` certifies at `epsilon`."""
    parts = terms(event)
    accountant = _composed(parts, relation, discretization or _interval_of(parts, 1e-6))
    return min(1.0, float(accountant.get_delta(target_epsilon=epsilon)) + FFT_ALLOWANCE)


def attack_power(
    event: DpEvent,
    false_positive_rates: Sequence[float],
    relation: Relation = "zero_out",
    discretization: float | None = None,
) -> list[float]:
    """The highest true-positive rate of any membership attack at each false-positive rate: the trade-off curve."""
    parts = terms(event)
    accountant = _composed(parts, relation, discretization or _interval_of(parts, 1e-6))
    deltas = [accountant.get_delta(target_epsilon=float(epsilon)) + FFT_ALLOWANCE for epsilon in trade_off.EPSILONS]
    return [trade_off.true_positive_rate(np.minimum(1.0, deltas), rate) for rate in false_positive_rates]


def rdp(event: DpEvent, order: int) -> float:
    """ρ_α of `event` under zero_out, for an integer order α ≥ 2."""
    return renyi.total_divergence(terms(event), order)


def rdp_epsilon(event: DpEvent, delta: float) -> float:
    """ε at `delta` by RDP: looser than PLD, but plain sums, and a check on it."""
    require_delta(delta)
    return renyi.rdp_epsilon(terms(event), delta)


def interval_for(epsilon: float, delta: float, steps: int) -> float:
    """The coarsest interval h that costs ε at most about 0.05 %.

    Connect-the-dots adds at most h²/6 of variance a step; with ε ≈ V/2 + z √V, z² ≈ 2 ln(1/δ), that moves ε by about
    steps · h²/12 · (1 + z (z + ε/2)/ε). Any interval certifies; this only decides how tight it is.
    """
    z_squared = 2.0 * math.log(1.0 / delta)
    slope = (epsilon + z_squared + math.sqrt(z_squared) * epsilon / 2.0) / 12.0
    wanted = epsilon * math.sqrt(5e-4 / (max(steps, 1) * slope))
    return next((interval for interval in _INTERVALS if interval <= wanted), _INTERVALS[-1])


def require_delta(delta: float) -> None:
    """Raises ValueError where δ is outside what float64 can certify."""
    if not MIN_DELTA <= delta < 1.0:
        raise ValueError(f"delta must lie in [{MIN_DELTA:g}, 1)")


def _interval_of(parts: Sequence[Term], delta: float) -> float:
    if not parts:
        return _INTERVALS[0]
    guess = renyi.rdp_epsilon(parts, delta)
    return interval_for(max(guess, 1e-3), delta, sum(term.count for term in parts))


def _composed(parts: Sequence[Term], relation: Relation, interval: float) -> PLDAccountant:
    accountant = PLDAccountant(neighboring_relation=_RELATIONS[relation], value_discretization_interval=interval)
    return accountant.compose(_event(parts))


def _event(parts: Sequence[Term]) -> DpEvent:
    """One event with all plain Gaussians merged into one of σ⁻² = Σ count · σ_i⁻²: exact, and fewer convolutions."""
    events: list[DpEvent] = []
    precision = math.fsum(term.count / term.noise_multiplier**2 for term in parts if term.sampling_probability == 1.0)
    if precision > 0.0:
        events.append(dp_accounting.GaussianDpEvent(precision**-0.5))
    for term in parts:
        if term.sampling_probability < 1.0:
            gaussian = dp_accounting.GaussianDpEvent(term.noise_multiplier)
            step = dp_accounting.PoissonSampledDpEvent(term.sampling_probability, gaussian)
            events.append(dp_accounting.SelfComposedDpEvent(step, term.count))
    return dp_accounting.ComposedDpEvent(events)
