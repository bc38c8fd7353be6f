"""Independent second opinions. The one place where Opacus' accountants are imported."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable

import numpy as np
from scipy import integrate, stats

from app.privacy.renyi import Term

PRV_EPS_ERROR = 0.01


def prv_epsilon(terms: Iterable[Term], delta: float) -> float:
    """Opacus' PRV upper bound (Gopi, Lee & Wutschitz 2021), at most PRV_EPS_ERROR above the exact ε. For q < 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        accountant.history = [(term.noise_multiplier, term.sampling_probability, term.count) for term in terms]
        return float(accountant.get_epsilon(delta=delta, eps_error=PRV_EPS_ERROR))


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """δ(ε) of one Gaussian release by quadrature of its definition, ∫ max(0, p − e^ε q)."""
    threshold = epsilon * sigma**2 + 0.5

    def hockey_stick(x: float) -> float:
        return stats.norm.pdf(x, 1.0, sigma) - math.exp(epsilon) * stats.norm.pdf(x, 0.0, sigma)

    return integrate.quad(hockey_stick, threshold, max(threshold, 1.0) + 40.0 * sigma, epsabs=0.0, epsrel=1e-10)[0]


def sampled_gaussian_rdp(q: float, sigma: float, order: float) -> tuple[float, float]:
    """Rényi divergences of the sampled Gaussian in both directions by quadrature: (mixture ‖ base, base ‖ mixture)."""

    def log_ratio(x: float) -> float:
        return float(np.logaddexp(math.log1p(-q), math.log(q) + (2.0 * x - 1.0) / (2.0 * sigma**2)))

    def moment(power: float) -> float:
        def integrand(x: float) -> float:
            return math.exp(power * log_ratio(x) + stats.norm.logpdf(x, 0.0, sigma))

        pieces = np.linspace(-15.0 * sigma, abs(power) + 15.0 * sigma, 25)
        return math.fsum(
            integrate.quad(integrand, a, b, epsabs=0.0, epsrel=1e-12)[0] for a, b in itertools.pairwise(pieces)
        )

    return math.log(moment(order)) / (order - 1.0), math.log(moment(1.0 - order)) / (order - 1.0)


def worst_delta_of_rdp(rho: float, order: int, epsilon: float) -> float:
    """The largest δ(ε) of any pair of distributions with Rényi divergence ρ of that order, by search over coins.

    Two outcomes suffice (Asoodeh et al. 2021: joint range of f-divergences). For each p the least q is found by
    bisection.
    """
    p = np.exp(np.linspace(math.log(1e-12), math.log(0.5), 20_000))
    p = np.concatenate([p, 1.0 - p[::-1]])
    # log q from far below up to p, where the divergence is 0: it falls as q rises to p.
    low, high = np.log(p) - 400.0 / order, np.log(p)
    for _ in range(200):
        middle = (low + high) / 2.0
        first = order * np.log(p) + (1.0 - order) * middle
        second = order * np.log1p(-p) + (1.0 - order) * np.log1p(-np.exp(middle))
        too_far = np.logaddexp(first, second) > (order - 1.0) * rho
        low, high = np.where(too_far, middle, low), np.where(too_far, high, middle)
    return float(np.max(p - np.exp(epsilon + high)))
