"""The budget's filter: never past its capacity, never short of an exact fit, whatever adaptive plans arrive."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.privacy import renyi
from app.privacy.accountants import pld_epsilon
from app.privacy.calibration import calibrate
from app.privacy.dp_events import compose, event_for, terms
from app.privacy.filter import UNIT, RenyiBudget
from app.privacy.plan import GaussianRelease
from tests.privacy.plans import head, sampled

DELTA = 1e-6


@pytest.mark.parametrize("limit", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("seed", range(3))
def test_adaptive_plans_never_pass_the_capacity(limit: float, seed: int) -> None:
    """Each plan is chosen after the earlier ones, some stop early; the rest of a reservation returns."""
    rng = np.random.default_rng(seed)
    budget = RenyiBudget.create(limit, DELTA)
    charged: list[float] = []
    events = []
    refused = 0
    while refused < 6 and len(events) < 25:
        wish = limit * rng.uniform(0.05, 0.5) * (1.0 + 0.5 * math.sin(sum(charged)))  # a choice that looks back
        steps, rate = int(rng.choice([20, 160])), float(rng.choice([0.02, 0.125, 1.0]))
        parts = calibrate(lambda s, q=rate, n=steps: (sampled("main", q, n, s),), wish, DELTA).parts
        rho = budget.rho_of(event_for(parts))
        if not budget.admits(charged, rho):
            refused += 1
            continue
        if rng.random() < 0.3:  # cancelled: executed steps are charged
            parts = (sampled("main", rate, int(rng.integers(1, steps)), parts[0].noise_multiplier),)
        events.append(event_for(parts))
        charged.append(budget.rho_of(events[-1]))
        assert charged[-1] <= rho
        assert sum(map(Fraction, charged)) <= Fraction(budget.capacity)
    assert events
    assert refused or len(events) == 25
    assert budget.epsilon_of(sum(charged)) <= limit
    assert pld_epsilon(compose(events), DELTA, discretization=1e-3).epsilon <= limit


def test_the_largest_divergence_a_budget_admits_keeps_its_promise() -> None:
    """A single Gaussian whose ρ is the whole capacity is (ε, δ)-DP by its exact curve."""
    for limit in (1.0, 3.0, 8.0):
        budget = RenyiBudget.create(limit, DELTA)
        sigma = math.sqrt(budget.order / (2.0 * budget.capacity)) * (1 + 1e-9)
        event = event_for((GaussianRelease("all", sigma, 1.0),))
        assert budget.admits(0.0, budget.rho_of(event))
        assert 0.6 * limit < pld_epsilon(event, DELTA).epsilon <= limit


@given(weights=st.lists(st.integers(1, 10**9), min_size=1, max_size=50), seed=st.randoms(use_true_random=False))
@settings(deadline=None)
def test_an_exactly_fitting_plan_is_admitted_in_any_order(weights: list[int], seed) -> None:
    """Capacity cut into shares that add to it exactly: all fit, in every order and grouping; a unit more does not."""
    budget = RenyiBudget.create(8.0, DELTA)
    units = int(budget.capacity / UNIT)
    shares = [units * weight // sum(weights) for weight in weights]
    shares[0] += units - sum(shares)
    amounts = [share * UNIT for share in shares]
    seed.shuffle(amounts)
    assert all(budget.admits(amounts[:count], amounts[count]) for count in range(len(amounts)))
    running = list(itertools.accumulate(amounts))  # plain float additions, as SQL does them
    assert running[-1] == budget.capacity
    assert budget.remaining(running[-1]) == 0.0
    assert budget.admits(running[-1], 0.0)
    assert not budget.admits(running[-1], UNIT)
    assert not budget.admits(amounts, UNIT)
    assert budget.epsilon_of(running[-1]) == budget.epsilon_limit


@given(st.lists(st.floats(0.0, 1.0), max_size=30), st.floats(0.0, 1.0))
@settings(deadline=None)
def test_admission_is_the_exact_comparison_for_any_amounts(charged: list[float], rho: float) -> None:
    budget = RenyiBudget.create(8.0, DELTA)
    total = sum(map(Fraction, charged)) + Fraction(rho)
    assert budget.admits(charged, rho) == (total <= Fraction(budget.capacity))
    # The amount whose float sum with the others would round down to an exact fit.
    hair = budget.capacity - math.fsum(charged)
    if hair > 0.0:
        above = math.nextafter(hair, math.inf)
        fits = sum(map(Fraction, charged)) + Fraction(above) <= Fraction(budget.capacity)
        assert budget.admits(charged, above) == fits


def test_rho_is_rounded_against_the_spender() -> None:
    budget = RenyiBudget.create(3.0, DELTA)
    for sigma in (2.7, 11.0, 60.0, 400.0):
        event = event_for((sampled("main", 0.125, 160, sigma),))
        rho = budget.rho_of(event)
        assert rho % UNIT == 0.0
        exact = Fraction(renyi.total_divergence(terms(event), budget.order))
        assert exact < Fraction(rho) <= exact + 3 * Fraction(UNIT)
    assert budget.capacity <= renyi.capacity(3.0, DELTA, budget.order)
    assert budget.rho_of(compose([])) == 0.0


def test_spent_epsilon_runs_from_nothing_to_the_limit() -> None:
    budget = RenyiBudget.create(10.0, DELTA)
    assert budget.epsilon_of(0.0) == 0.0
    spent = [budget.epsilon_of(share * budget.capacity) for share in (0.0, 0.1, 0.5, 0.9, 1.0)]
    assert spent == sorted(spent)
    assert spent[-1] == 10.0


def test_the_first_plan_may_be_admitted_by_pld_alone() -> None:
    budget = RenyiBudget.create(3.0, DELTA)
    event = event_for(calibrate(head, 3.0, DELTA).parts)
    assert not budget.admits(0.0, budget.rho_of(event))
    assert budget.admits_first(event)
    assert not budget.admits_first(event_for(calibrate(head, 3.1, DELTA).parts))
    assert not budget.admits(budget.rho_of(event), UNIT)  # closed after it


def test_the_order_stays_when_the_limit_is_raised() -> None:
    small = RenyiBudget.create(3.0, DELTA)
    raised = RenyiBudget(8.0, DELTA, small.order)
    assert raised.order != RenyiBudget.create(8.0, DELTA).order
    assert raised.capacity > small.capacity
    assert raised.epsilon_of(small.capacity) <= 3.0


@pytest.mark.parametrize(
    ("limit", "delta", "order"),
    [
        (0.0, 1e-6, 4),
        (-1.0, 1e-6, 4),
        (1e4, 1e-6, 4),
        (math.nan, 1e-6, 4),
        (3.0, 0.0, 4),
        (3.0, 1e-6, 1),
        (1.0, 1e-6, 2),
    ],
)
def test_a_budget_without_meaning_is_refused(limit: float, delta: float, order: int) -> None:
    with pytest.raises(ValueError, match=r"epsilon_limit|delta|order"):
        RenyiBudget(limit, delta, order)


def test_how_many_default_jobs_fit() -> None:
    """The defaults that were chosen by this figure: ε = 10 at δ = 1e-6 holds seven jobs at ε = 3."""
    budget = RenyiBudget.create(10.0, DELTA)
    rho = budget.rho_of(event_for(calibrate(head, 3.0, DELTA).parts))
    assert int(budget.capacity / rho) == 7
