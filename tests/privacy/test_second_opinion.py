"""PLD against Opacus' PRV: PLD ≤ PRV ≤ PLD + PRV's own error + 1 %, over a grid of plans with q < 1."""

from __future__ import annotations

import numpy as np
import pytest

from app.privacy.accountants import pld_epsilon, rdp_epsilon
from app.privacy.calibration import calibrate
from app.privacy.dp_events import event_for, terms
from tests.privacy import oracles
from tests.privacy.plans import sampled


def agree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    delta = float(rng.choice([1e-5, 1e-6, 1e-7]))
    target = float(np.exp(rng.uniform(np.log(0.3), np.log(10.0))))
    phases = [
        (float(np.exp(rng.uniform(np.log(2e-3), np.log(0.5)))), int(np.exp(rng.uniform(np.log(20), np.log(2000)))))
        for _ in range(rng.integers(1, 3))
    ]

    def build(sigma: float):
        return tuple(sampled(f"p{i}", q, steps, sigma * (1 + i)) for i, (q, steps) in enumerate(phases))

    event = event_for(calibrate(build, target, delta).parts)
    certified = pld_epsilon(event, delta).epsilon
    second = oracles.prv_epsilon(terms(event), delta)
    assert certified <= second <= certified * 1.01 + oracles.PRV_EPS_ERROR, (delta, target, phases)
    assert certified <= rdp_epsilon(event, delta) * 1.001


@pytest.mark.parametrize("seed", range(30))
def test_pld_and_prv_agree(seed: int) -> None:
    agree(seed)


@pytest.mark.slow
def test_pld_and_prv_agree_on_two_hundred_plans() -> None:
    for seed in range(1000, 1200):
        agree(seed)


def test_reference_figure() -> None:
    event = event_for((sampled("main", 0.01, 1000, 1.0),))
    assert oracles.prv_epsilon(terms(event), 1e-5) == pytest.approx(1.838, abs=2e-3)
