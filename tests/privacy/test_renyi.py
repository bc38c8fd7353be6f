"""Rényi divergences and their conversion against numeric oracles."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from app.privacy import renyi
from app.privacy.renyi import Term
from tests.privacy import oracles


@pytest.mark.parametrize("q", [0.001, 0.125, 0.9])
@pytest.mark.parametrize("sigma", [0.7, 1.5, 8.0])
@pytest.mark.parametrize("order", [2, 4, 11])
def test_divergence_against_quadrature_in_both_directions(q: float, sigma: float, order: int) -> None:
    ours = renyi.divergence(Term(q, sigma, 1), order)
    forward, backward = oracles.sampled_gaussian_rdp(q, sigma, order)
    assert ours == pytest.approx(forward, rel=1e-6, abs=1e-13)
    assert ours >= backward * (1 - 1e-6) - 1e-13


@given(
    q=st.floats(1e-5, 1.0),
    sigma=st.floats(0.3, 50.0),
    count=st.integers(1, 10_000),
    order=st.sampled_from([2, 5, 32, 200]),
)
@settings(max_examples=60, deadline=None)
def test_divergence_against_dp_accounting(q: float, sigma: float, count: int, order: int) -> None:
    theirs = RdpAccountant(orders=[order], neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    event = dp_accounting.GaussianDpEvent(sigma)
    theirs.compose(dp_accounting.PoissonSampledDpEvent(q, event) if q < 1.0 else event, count)
    ours = renyi.total_divergence([Term(q, sigma, count)], order)
    # Theirs subtracts logarithms, which leaves absolute errors near 1e-15 a step.
    assert ours == pytest.approx(float(theirs._rdp[0]), rel=1e-9, abs=count * 1e-13)


@given(q=st.floats(1e-4, 1.0), sigma=st.floats(0.3, 20.0), more=st.floats(1.001, 2.0))
@settings(max_examples=60, deadline=None)
def test_more_noise_or_fewer_units_never_costs_more(q: float, sigma: float, more: float) -> None:
    for order in (2, 4, 9):
        here = renyi.divergence(Term(q, sigma, 1), order)
        assert renyi.divergence(Term(q, sigma * more, 1), order) <= here
        assert renyi.divergence(Term(q / more, sigma, 1), order) <= here
        assert renyi.divergence(Term(q, sigma, 1), order + 1) >= here


@pytest.mark.parametrize(("rho", "order"), [(0.05, 28), (0.5, 9), (2.0, 4), (6.0, 4), (9.0, 3)])
@pytest.mark.parametrize("delta", [1e-4, 1e-6])
def test_conversion_bounds_every_pair_of_distributions(rho: float, order: int, delta: float) -> None:
    epsilon = renyi.epsilon_of_divergence(rho, order, delta)
    worst = oracles.worst_delta_of_rdp(rho, order, epsilon)
    assert 0.3 * delta <= worst <= delta * (1 + 1e-9)  # sound, and not by being idle


def test_nothing_spent_is_no_epsilon() -> None:
    assert renyi.epsilon_of_divergence(0.0, 4, 1e-6) == 0.0
    assert renyi.epsilon_of_divergence(1e-13, 4, 1e-6) == 0.0
    assert renyi.epsilon_of_divergence(1e-3, 4, 1e-6) > 0.0


@given(epsilon=st.floats(0.1, 50.0), exponent=st.integers(3, 9))
@settings(deadline=None, max_examples=30)
def test_capacity_inverts_the_conversion(epsilon: float, exponent: int) -> None:
    delta = 10.0**-exponent
    order = renyi.best_order(epsilon, delta)
    room = renyi.capacity(epsilon, delta, order)
    assert room > 0.0
    assert renyi.epsilon_of_divergence(room, order, delta) == pytest.approx(epsilon, rel=1e-12)


@pytest.mark.parametrize(("epsilon", "order"), [(1.0, 22), (3.0, 9), (8.0, 4), (10.0, 4), (20.0, 3)])
def test_order_stays_near_the_rule_of_thumb(epsilon: float, order: int) -> None:
    assert renyi.best_order(epsilon, 1e-6) == order
    assert order <= 1.5 * (1 + 1.5 * math.log(1e6) / epsilon)
