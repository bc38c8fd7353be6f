"""Published reference figures, bounds between accountants, and the words under which a figure is stated."""

from __future__ import annotations

import math

import pytest
from scipy import special

from app.privacy.accountants import attack_power, pld_delta, pld_epsilon, pld_epsilons, rdp, rdp_epsilon
from app.privacy.calibration import gaussian_delta
from app.privacy.dp_events import event_for
from tests.privacy.plans import head, sampled, warm_then_body

REFERENCE = event_for((sampled("main", 0.01, 1000, 1.0),))


def test_reference_figures() -> None:
    assert pld_epsilon(REFERENCE, 1e-5, discretization=1e-4).epsilon == pytest.approx(1.828, abs=5e-4)
    assert 2.101 <= rdp_epsilon(REFERENCE, 1e-5) <= 2.11  # 2.101 over fractional orders too
    assert pld_epsilon(REFERENCE, 1e-5, relation="replace_one", discretization=1e-4).epsilon == pytest.approx(
        2.843, abs=1e-3
    )


def test_never_the_central_limit_figure() -> None:
    assert pld_epsilon(REFERENCE, 1e-5).epsilon > 1.82  # the GDP approximation says 1.618


def test_a_coarser_grid_is_never_more_optimistic() -> None:
    figures = [pld_epsilon(REFERENCE, 1e-5, discretization=h).epsilon for h in (1e-4, 1e-3, 1e-2)]
    assert figures == sorted(figures)


def test_the_chosen_grid_costs_little() -> None:
    chosen = pld_epsilon(REFERENCE, 1e-5)
    assert chosen.epsilon <= 1.0015 * pld_epsilon(REFERENCE, 1e-5, discretization=5e-5).epsilon


def test_a_figure_states_how_it_was_computed() -> None:
    figure = pld_epsilon(REFERENCE, 1e-5, discretization=1e-3)
    assert (figure.delta, figure.relation, figure.discretization) == (1e-5, "zero_out", 1e-3)
    assert "PLD" in figure.accountant
    assert "0.001" in figure.accountant
    assert "zero_out" in figure.accountant


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_one_gaussian_against_its_closed_form(sigma: float) -> None:
    event = event_for((sampled("all", 1.0, 1, sigma),))
    for epsilon in (0.1, 1.0, 3.0):
        exact = gaussian_delta(sigma, epsilon)
        if exact > 1e-9:
            assert exact <= pld_delta(event, epsilon) <= 1.01 * exact + 1e-11


def test_full_batches_compose_like_one_gaussian() -> None:
    many = event_for((sampled("all", 1.0, 25, 10.0),))
    one = event_for((sampled("all", 1.0, 1, 2.0),))
    assert pld_epsilon(many, 1e-6).epsilon == pytest.approx(pld_epsilon(one, 1e-6).epsilon, rel=1e-3)


@pytest.mark.parametrize("build", [head, warm_then_body])
@pytest.mark.parametrize("sigma", [1.0, 3.0])
def test_the_three_figures_are_ordered(build, sigma: float) -> None:
    event = event_for(build(sigma))
    certified = pld_epsilon(event, 1e-6).epsilon
    assert certified <= rdp_epsilon(event, 1e-6) <= 1.35 * certified
    assert certified < pld_epsilon(event, 1e-6, relation="replace_one").epsilon


def test_epsilon_falls_as_delta_rises() -> None:
    figures = pld_epsilons(REFERENCE, [1e-8, 1e-6, 1e-4])
    assert [f.epsilon for f in figures] == sorted((f.epsilon for f in figures), reverse=True)
    assert pld_delta(REFERENCE, figures[1].epsilon) <= 1e-6 * 1.01


@pytest.mark.parametrize("delta", [0.0, 1e-11, 1.0, -1e-5, math.nan])
def test_a_delta_that_float64_cannot_certify_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        pld_epsilon(REFERENCE, delta)


def test_attack_power_of_one_gaussian() -> None:
    """The optimal test between N(0, σ²) and N(1, σ²): TPR = Φ(Φ⁻¹(FPR) + 1/σ)."""
    event = event_for((sampled("all", 1.0, 1, 1.5),))
    for rate, power in zip((0.001, 0.01, 0.1), attack_power(event, (0.001, 0.01, 0.1)), strict=True):
        exact = float(special.ndtr(special.ndtri(rate) + 1 / 1.5))
        assert exact <= power <= 1.02 * exact


def test_rdp_of_a_gaussian_is_linear_in_the_order() -> None:
    event = event_for((sampled("all", 1.0, 3, 2.0),))
    assert rdp(event, 4) == pytest.approx(3 * 4 / (2 * 2.0**2), rel=1e-15)
