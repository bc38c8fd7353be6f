"""Admission of adaptively chosen plans to a budget: a Rényi filter.

Jobs come one after another, and each is chosen after the models of earlier ones were seen. Composing their PLDs is then
not a valid stopping rule. Rényi divergences of one order, fixed beforehand, are: if every plan is admitted only while
Σ ρ_α ≤ capacity, all that is ever released is (α, capacity)-RDP, however the plans were chosen (Feldman & Zrnic 2021,
"Individual privacy accounting via a Rényi filter", Theorem 4.3; Lécuyer 2021, "Practical privacy filters and odometers
with Rényi differential privacy"), hence (ε, δ)-DP by the conversion that fixed the capacity (Canonne, Kamath & Steinke
2020, Proposition 12; Balle et al. 2020).

ρ is kept like money: rounded up to whole units of 2⁻⁴⁰, capacities down. Sums of such floats below 2¹² are exact in
float64, in any order and also in SQL, so that a plan which fits exactly is admitted and nothing beyond ever is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dp_accounting import DpEvent

from app.privacy import renyi
from app.privacy.accountants import pld_epsilon, rdp, require_delta

#: One unit of ρ: sums of multiples of it are exact in float64 up to 2¹².
UNIT = 2.0**-40

#: Limits beyond this promise nothing, and would leave the range of exact sums.
MAX_EPSILON_LIMIT = 1000.0


@dataclass(frozen=True, slots=True)
class RenyiBudget:
    """A limit (ε, δ) on all that ever happens to some data, as a filter of one Rényi order.

    order: α, fixed when the budget is created and stored with it; `RenyiBudget.create` chooses it. It stays when the
    limit is raised: the filter's theorem wants it fixed before the first plan.
    """

    epsilon_limit: float
    delta: float
    order: int

    def __post_init__(self) -> None:
        if not 0.0 < self.epsilon_limit <= MAX_EPSILON_LIMIT:
            raise ValueError(f"epsilon_limit must lie in (0, {MAX_EPSILON_LIMIT:g}]")
        require_delta(self.delta)
        if not (isinstance(self.order, int) and self.order >= 2):
            raise ValueError("order must be an integer of at least 2")
        if self.capacity <= 0.0:
            raise ValueError("at the Rényi order that the budget was made with nothing fits so low a limit")

    @classmethod
    def create(cls, epsilon_limit: float, delta: float) -> RenyiBudget:
        """A new budget, with the order at which the most plans fit its limit."""
        if not 0.0 < epsilon_limit <= MAX_EPSILON_LIMIT:
            raise ValueError(f"epsilon_limit must lie in (0, {MAX_EPSILON_LIMIT:g}]")
        require_delta(delta)
        return cls(epsilon_limit, delta, renyi.best_order(epsilon_limit, delta))

    @property
    def capacity(self) -> float:
        """The ρ_α that may be spent in all, in whole units."""
        return math.floor(renyi.capacity(self.epsilon_limit, self.delta, self.order) / UNIT) * UNIT

    def rho_of(self, event: DpEvent) -> float:
        """ρ_α of an event, rounded up to whole units: what is stored with the plan, reserved and charged."""
        # A part in 10¹² covers the rounding of the closed form's own float64 arithmetic.
        return math.ceil(rdp(event, self.order) * (1.0 + 1e-12) / UNIT) * UNIT

    def admits(self, charged_and_reserved: float | Iterable[float], rho: float) -> bool:
        """Whether a plan of `rho` fits beside what is charged and reserved already (a sum, or its summands)."""
        return self._total(charged_and_reserved, rho, -self.capacity) <= 0.0

    def admits_first(self, event: DpEvent) -> bool:
        """Whether PLD alone admits `event` as the budget's first and only plan so far: ε ≤ limit at the budget's δ.

        Nothing is adaptive about one plan fixed in advance, so its PLD is a valid certificate. Where its ρ exceeds the
        capacity, the budget is closed after it, whatever part of the plan was executed: stopping early is a choice made
        after seeing outputs, which only the filter would cover. Not for use inside a transaction: it computes a PLD.
        """
        return pld_epsilon(event, self.delta).epsilon <= self.epsilon_limit

    def remaining(self, charged_and_reserved: float | Iterable[float]) -> float:
        """ρ that still fits; 0 where nothing does."""
        return max(0.0, -self._total(charged_and_reserved, -self.capacity))

    def epsilon_of(self, rho_total: float) -> float:
        """ε at the budget's δ that a total ρ converts to; 0 for nothing, the limit for the whole capacity."""
        if rho_total == self.capacity:
            return self.epsilon_limit  # the capacity was rounded down: all of it must not read as a hair less
        return renyi.epsilon_of_divergence(rho_total, self.order, self.delta)

    @staticmethod
    def _total(amounts: float | Iterable[float], *more: float) -> float:
        summands = (amounts,) if isinstance(amounts, int | float) else tuple(amounts)
        # fsum rounds the exact sum once, so its sign is the exact sum's.
        return math.fsum((*summands, *more))
