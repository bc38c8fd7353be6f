"""Rényi differential privacy of Gaussian sums, and its conversion to (ε, δ): closed forms in float64, NumPy only.

Orders are integers: the Poisson-sampled Gaussian then has an exact finite sum (Mironov, Talwar & Zhang 2019, section
3.3), which an auditor can evaluate without a library. The relation is zero_out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

#: Orders over which `rdp_epsilon` takes the best conversion.
ORDERS = (*range(2, 33), 40, 48, 64, 96, 128, 256, 512)

_LARGEST_ORDER = 256


@dataclass(frozen=True, slots=True, order=True)
class Term:
    """`count` Gaussian sums of noise multiplier σ over a Poisson sample of rate q (q = 1: over all)."""

    sampling_probability: float
    noise_multiplier: float
    count: int


def divergence(term: Term, order: int) -> float:
    """ρ_α of one of the term's sums: the larger of the two directions' Rényi divergences of integer order α ≥ 2."""
    q, sigma = term.sampling_probability, term.noise_multiplier
    if q == 1.0:
        return order / (2.0 * sigma**2)
    k = np.arange(order + 1)
    log_binomials = np.concatenate([[0.0], np.cumsum(np.log((order - k[:-1]) / (k[:-1] + 1.0)))])
    exponents = (k * k - k) / (2.0 * sigma**2)
    log_summands = log_binomials + k * math.log(q) + (order - k) * math.log1p(-q) + exponents
    largest = float(log_summands.max())
    if largest < 30.0:
        # Without the exponents the summands are the binomial distribution and add to 1; summing only the excess over it
        # keeps the digits of a tiny divergence.
        excess = math.fsum(np.exp(log_summands) * -np.expm1(-exponents))
        return math.log1p(excess) / (order - 1)
    return (largest + math.log(math.fsum(np.exp(log_summands - largest)))) / (order - 1)


def total_divergence(terms: Iterable[Term], order: int) -> float:
    """ρ_α of all the terms composed: divergences add, also where later mechanisms are chosen after earlier outputs."""
    return math.fsum(term.count * divergence(term, order) for term in terms)


def epsilon_of_divergence(rho: float, order: int, delta: float) -> float:
    """ε at δ that a Rényi divergence ρ of order α implies; 0 where ρ alone says so (ρ = 0 among them).

    ε = ρ + ln((α−1)/α) − (ln δ + ln α)/(α−1): Canonne, Kamath & Steinke 2020 (Prop. 12), Balle et al. 2020 (Thm 21).
    Pinsker-like bound for tiny ρ: total variation ≤ √(1 − e^−ρ) (Bretagnolle & Huber), hence ε = 0 where that is ≤ δ.
    """
    if -math.expm1(-rho) <= delta**2:
        return 0.0
    return max(0.0, rho + conversion_offset(order, delta))


def conversion_offset(order: int, delta: float) -> float:
    """What the conversion adds to ρ: ln((α−1)/α) − (ln δ + ln α)/(α−1)."""
    return math.log1p(-1.0 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def capacity(epsilon: float, delta: float, order: int) -> float:
    """The largest ρ_α that the conversion accepts for (ε, δ); 0 or less where the order is too small for them."""
    return epsilon - conversion_offset(order, delta)


def best_order(epsilon: float, delta: float) -> int:
    """The order at which the most Gaussian sums fit (ε, δ): a plain Gaussian's ρ_α is proportional to α.

    Near 1 + 1.5 ln(1/δ)/ε for small ε; sampled Gaussians of sane noise have their best order within one of it.
    """
    return max(range(2, _LARGEST_ORDER + 1), key=lambda order: capacity(epsilon, delta, order) / order)


def rdp_epsilon(terms: Iterable[Term], delta: float) -> float:
    """The least ε at δ over ORDERS: an upper bound by plain sums, some per cent looser than PLD."""
    terms = tuple(terms)
    return min(epsilon_of_divergence(total_divergence(terms, order), order, delta) for order in ORDERS)
