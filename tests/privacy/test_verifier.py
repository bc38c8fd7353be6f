"""The verifier's own accountants agree with the one that certifies, and refuse what an event does not support."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from app.privacy.accountants import attack_power, pld_epsilon
from app.privacy.calibration import calibrate, gaussian_delta
from app.privacy.dp_events import event_for, terms, to_json
from app.privacy.renyi import Term
from app.privacy.verifier import Composed, _composed, composed, recompute, stored_terms
from tests.privacy.plans import head, sampled, warm_then_body

PLANS = {
    "reference": (sampled("main", 0.01, 1000, 1.0),),
    "head": head(2.7),
    "warm": warm_then_body(2.3),
    "one release": (sampled("all", 1.0, 1, 1.5),),
    "little noise": (sampled("main", 0.01, 100, 0.5),),
    "many steps": (sampled("main", 0.001, 20_000, 0.7),),
    "hardly anything": (sampled("main", 0.1, 20, 60.0),),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_agrees_with_the_certificate(name: str, delta: float) -> None:
    event = event_for(PLANS[name])
    certified = pld_epsilon(event, delta, discretization=1e-3).epsilon
    ours = recompute(to_json(event), delta, discretization=1e-3)
    assert ours.epsilon == pytest.approx(certified, rel=1e-4)
    assert ours.epsilon <= ours.epsilon_rdp * 1.001
    assert ours.supports(certified)


def test_random_plans() -> None:
    rng = np.random.default_rng(7)
    for _ in range(25):
        phases = [
            (float(np.exp(rng.uniform(-6.0, 0.0))), int(np.exp(rng.uniform(0.0, 7.0))))
            for _ in range(rng.integers(1, 4))
        ]
        target = float(np.exp(rng.uniform(-1.5, 2.3)))
        found = calibrate(
            lambda sigma, phases=phases: tuple(
                sampled(f"p{i}", q, steps, sigma * (i + 1)) for i, (q, steps) in enumerate(phases)
            ),
            target,
            1e-6,
        )
        again = recompute(to_json(event_for(found.parts)), 1e-6, found.discretization)
        assert again.supports(found.epsilon)
        assert again.epsilon >= found.epsilon * (1 - 1e-4) - 1e-6


@pytest.mark.parametrize(("q", "sigma"), [(0.3, 1.0), (0.9, 2.0)])
def test_both_directions(q: float, sigma: float) -> None:
    single = pld.from_gaussian_mechanism(sigma, sampling_prob=q, value_discretization_interval=1e-3)
    for direction, pmf in (("removing", single._pmf_remove), ("adding", single._pmf_add)):
        theirs = pmf.self_compose(50).get_epsilon_for_delta(1e-6 - 5e-12)
        ours = Composed((_composed([Term(q, sigma, 50)], 1e-3, direction),))
        assert ours.epsilon(1e-6) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_agrees_with_the_certificate_under_replace_one(name: str, delta: float) -> None:
    event = event_for(PLANS[name])
    certified = pld_epsilon(event, delta, "replace_one", 1e-3).epsilon
    assert composed(terms(event), 1e-3, "replace_one").epsilon(delta) == pytest.approx(certified, rel=1e-4)


def test_replaced_in_full_batches_is_one_gaussian_of_twice_the_sensitivity() -> None:
    found = composed((Term(1.0, 3.0, 4),), 1e-4, "replace_one").epsilon(1e-6)
    assert gaussian_delta(3.0 / 2.0 / 2.0, found) <= 1e-6
    assert gaussian_delta(3.0 / 2.0 / 2.0, found * 0.999) > 1e-6


@pytest.mark.parametrize("name", PLANS)
def test_the_trade_off_curve_agrees(name: str) -> None:
    event = event_for(PLANS[name])
    rates = (0.001, 0.01, 0.2)
    theirs = attack_power(event, rates, discretization=1e-3)
    ours = [composed(terms(event), 1e-3).true_positive_rate(rate) for rate in rates]
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("term", "discretization"),
    [(Term(0.5, 1e-4, 1), 1e-3), (Term(1.0, 0.03, 1), 1e-3), (Term(0.5, 0.3, 10_000_000), 1e-6), (Term(0.5, 1, 1), 9)],
)
def test_what_no_machine_can_hold_is_refused(term: Term, discretization: float) -> None:
    with pytest.raises(ValueError, match=r"grid|discretization"):
        composed((term,), discretization)


@pytest.mark.parametrize("sigma", [0.8, 3.0])
def test_one_release_against_its_closed_form(sigma: float) -> None:
    found = recompute({"type": "gaussian", "noise_multiplier": sigma}, 1e-6, 1e-4).epsilon
    assert gaussian_delta(sigma, found) <= 1e-6
    assert gaussian_delta(sigma, found * 0.999) > 1e-6


def test_nothing_costs_nothing() -> None:
    assert recompute({"type": "no_op"}, 1e-6).epsilon == 0.0


@pytest.mark.parametrize(
    ("field", "factor"), [("sampling_probability", 1.01), ("noise_multiplier", 0.99), ("count", 1.02)]
)
def test_an_event_that_costs_more_than_claimed_is_refused(field: str, factor: float) -> None:
    found = calibrate(lambda sigma: (sampled("main", 0.1, 200, sigma),), 3.0, 1e-6)
    stored = json.loads(json.dumps(to_json(event_for(found.parts))))
    assert recompute(stored, 1e-6, found.discretization).supports(found.epsilon)
    owner = {"count": stored, "sampling_probability": stored["event"], "noise_multiplier": stored["event"]["event"]}[
        field
    ]
    owner[field] = type(owner[field])(owner[field] * factor)
    assert not recompute(stored, 1e-6, found.discretization).supports(found.epsilon)


@pytest.mark.parametrize("name", PLANS)
def test_reads_what_the_ledger_stores(name: str) -> None:
    event = event_for(PLANS[name])
    assert stored_terms(json.loads(json.dumps(to_json(event)))) == terms(event)


@pytest.mark.parametrize(
    "stored",
    [
        {},
        [],
        {"type": "laplace"},
        {"type": "gaussian", "noise_multiplier": 1.0, "sampling_probability": 0.1},
        {"type": "gaussian", "noise_multiplier": 0.0},
        {"type": "gaussian", "noise_multiplier": math.nan},
        {"type": "gaussian", "noise_multiplier": True},
        {"type": "self_composed", "count": 0, "event": {"type": "no_op"}},
        {"type": "self_composed", "count": True, "event": {"type": "no_op"}},
        {"type": "self_composed", "count": -3, "event": {"type": "gaussian", "noise_multiplier": 1.0}},
        {"type": "poisson_sampled", "sampling_probability": 0.1, "event": {"type": "no_op"}},
        {
            "type": "poisson_sampled",
            "sampling_probability": 1.1,
            "event": {"type": "gaussian", "noise_multiplier": 1.0},
        },
        {"type": "composed", "events": "none"},
    ],
)
def test_anything_else_is_refused(stored) -> None:
    with pytest.raises(ValueError, match="stored event"):
        recompute(stored, 1e-6)


def test_needs_no_other_accountant() -> None:
    code = (
        "import sys, app.privacy.verifier\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'dp_accounting', 'scipy', 'torch', 'opacus'}, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
