"""ε recomputed from a stored event by accountants of their own: for an auditor, offline, with NumPy alone.

Nothing here is shared with the accountant that certified (dp-accounting), and neither torch nor Opacus is needed. Two
upper bounds: RDP, which is plain sums, and a privacy loss distribution on a grid, composed by FFT.

The grid. A mechanism is a pair of distributions (P, Q) and a loss l = ln dP/dQ. The mass of each cell is moved to the
cell's two ends such that both its P-mass and its Q-mass stay what they are. That is what post-processing could undo, so
the moved pair is at least as distinguishable (Doroshenko et al. 2022, "Connect the Dots"): δ(ε) of the moved pair is an
upper bound. What lies above the grid counts as an infinite loss, what lies below it is moved up to its lower end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.privacy.renyi import Term, rdp_epsilon

#: Rounding of the FFT in float64, and what may wrap around its window; both are added to every δ.
_FFT_ALLOWANCE = 5e-12
_WRAPPED = 1e-13

#: Standard deviations of the noise that the grid of one mechanism covers; the rest is 1e-20.
_REACH = 9.3

#: At one discretization the two accountants differ by rounding only: at most 4e-5 of ε was seen.
CLAIM_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Recomputed:
    """Upper bounds on ε at `delta` under zero_out: by FFT at `discretization`, and by RDP."""

    epsilon: float
    epsilon_rdp: float
    delta: float
    discretization: float

    def supports(self, claimed_epsilon: float) -> bool:
        """Whether a claim, certified at this discretization, is no lower than what the event costs."""
        return min(self.epsilon, self.epsilon_rdp) <= claimed_epsilon * (1.0 + CLAIM_TOLERANCE) + 1e-6


def recompute(event: Mapping[str, Any], delta: float, discretization: float = 5e-4) -> Recomputed:
    """ε of an event as the ledger and reports store it. Raises ValueError for anything that is not such an event."""
    if not 1e-10 <= delta < 1.0:
        raise ValueError("delta must lie in [1e-10, 1)")
    if not 1e-6 <= discretization <= 0.1:
        raise ValueError("discretization must lie in [1e-6, 0.1]")
    terms = stored_terms(event)
    return Recomputed(fft_epsilon(terms, delta, discretization), rdp_epsilon(terms, delta), delta, discretization)


def stored_terms(event: Mapping[str, Any]) -> tuple[Term, ...]:
    """The Gaussian sums of a stored event. Raises ValueError for anything that is not such an event."""
    counts: Counter[tuple[float, float]] = Counter()

    def visit(node: Mapping[str, Any], count: int, rate: float | None) -> None:
        match node:
            case {"type": "no_op"}:
                return
            case {"type": "gaussian", "noise_multiplier": float(sigma)} if 0.0 < sigma < math.inf:
                counts[(1.0 if rate is None else rate, sigma)] += count
            case {
                "type": "poisson_sampled",
                "sampling_probability": float(q),
                "event": {"type": "gaussian"} as inner,
            } if 0.0 < q < 1.0 and rate is None:
                visit(inner, count, q)
            case {"type": "self_composed", "count": int(times), "event": inner} if times >= 1 and rate is None:
                visit(inner, count * times, None)
            case {"type": "composed", "events": [*parts]} if rate is None:
                for part in parts:
                    visit(part, count, None)
            case _:
                raise ValueError("not a stored event")

    visit(event, 1, None)
    return tuple(Term(q, sigma, count) for (q, sigma), count in sorted(counts.items()))


def fft_epsilon(terms: Sequence[Term], delta: float, discretization: float) -> float:
    """The least ε whose δ, in both directions of the neighbouring relation, is at most `delta`."""
    if not terms:
        return 0.0
    return max(_direction_epsilon(terms, delta, discretization, removing) for removing in (True, False))


@dataclass(frozen=True, slots=True)
class _Losses:
    """Masses on losses (first + i)·h, and the mass of an infinite loss."""

    first: int
    masses: np.ndarray
    infinite: float


def _direction_epsilon(terms: Sequence[Term], delta: float, h: float, removing: bool) -> float:
    singles = [(_losses(term.sampling_probability, term.noise_multiplier, h, removing), term.count) for term in terms]
    log_finite = math.fsum(count * math.log1p(-losses.infinite) for losses, count in singles)
    low, high = _window(singles)
    size = 1 << (high - low).bit_length()
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    for losses, count in singles:
        # A circular convolution: masses are laid out by their loss modulo the window's size.
        laid = np.bincount((losses.first + np.arange(len(losses.masses))) % size, losses.masses, size)
        spectrum *= np.fft.rfft(laid) ** count
    composed = np.maximum(np.roll(np.fft.irfft(spectrum, size), -(low % size)), 0.0)
    grid = (low + np.arange(size)) * h
    fixed = -math.expm1(log_finite) + _WRAPPED + _FFT_ALLOWANCE
    return _least_epsilon(grid, composed, fixed, delta)


def _losses(q: float, sigma: float, h: float, removing: bool) -> _Losses:
    """One Poisson-sampled Gaussian sum. Removing: P = (1−q) N(0, σ²) + q N(1, σ²) and Q = N(0, σ²); adding: swapped."""

    def loss(x: float) -> float:
        return float(
            np.logaddexp(math.log1p(-q) if q < 1.0 else -math.inf, math.log(q) + (2.0 * x - 1.0) / (2.0 * sigma**2))
        )

    ends = (loss(-_REACH * sigma), loss(1.0 + _REACH * sigma))
    bottom, top = ends if removing else (-ends[1], -ends[0])
    first, last = math.floor(bottom / h), math.ceil(top / h)
    edges = np.arange(first, last + 1) * h
    sign = 1.0 if removing else -1.0
    # x at which the loss is the edge: ln(1 − q + q e^((2x−1)/2σ²)) = ± edge; below ln(1 − q) there is none.
    odds = np.maximum(np.expm1(sign * edges) / q, -1.0)
    with np.errstate(divide="ignore"):
        cuts = sigma**2 * np.log1p(odds) + 0.5
    below, above = _tails(cuts / sigma), _tails((cuts - 1.0) / sigma)
    base = _cells(*below)
    mixture = (1.0 - q) * base + q * _cells(*above)
    beyond_base = below[1][-1] if removing else below[0][-1]
    beyond_mixture = (1.0 - q) * beyond_base + q * (above[1][-1] if removing else above[0][-1])
    p, q_mass = (mixture, base) if removing else (base, mixture)
    infinite = beyond_mixture if removing else beyond_base
    # Cell (l, l + h]: low + high = P, low e^−l + high e^−(l+h) = Q. By e^l, which keeps the numbers near one.
    high_share = np.clip((p - q_mass * np.exp(edges[:-1])) / -math.expm1(-h), 0.0, p)
    masses = np.zeros(len(edges))
    masses[1:] += high_share
    masses[:-1] += p - high_share
    masses[0] += max(0.0, 1.0 - math.fsum(masses) - infinite)
    return _Losses(first, masses, float(infinite))


def _tails(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Φ(z) and 1 − Φ(z), each with its own digits."""
    scaled = (z / math.sqrt(2.0)).tolist()
    lower = np.array([0.5 * math.erfc(-value) for value in scaled])
    upper = np.array([0.5 * math.erfc(value) for value in scaled])
    return lower, upper


def _cells(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Probability between neighbouring cuts, by whichever tail cancels less; cuts may rise or fall."""
    return np.where(lower[1:] + lower[:-1] < 1.0, np.abs(np.diff(lower)), np.abs(np.diff(upper)))


def _window(singles: Sequence[tuple[_Losses, int]]) -> tuple[int, int]:
    """Bounds, in cells, that the composed finite loss leaves with probability below _WRAPPED (Chernoff's bound)."""
    low = sum(count * losses.first for losses, count in singles)
    high = sum(count * (losses.first + len(losses.masses) - 1) for losses, count in singles)
    widest = max(len(losses.masses) for losses, _ in singles)
    spread = math.sqrt(sum(count for _, count in singles))
    for exponent in np.linspace(-6.0, 6.0, 49):
        rate = 2.0**exponent * 20.0 / (widest * max(1.0, spread / 20.0))
        for sign in (1.0, -1.0):
            log_moment = math.fsum(count * _log_moment(losses, sign * rate) for losses, count in singles)
            bound = (log_moment - math.log(_WRAPPED / 2.0)) / rate
            if sign > 0:
                high = min(high, math.ceil(bound))
            else:
                low = max(low, math.floor(-bound))
    return low, max(high, low + 1)


def _log_moment(losses: _Losses, rate: float) -> float:
    """ln Σ mass · e^(rate · cell)."""
    exponents = rate * (losses.first + np.arange(len(losses.masses)))
    largest = float(exponents.max())
    return largest + math.log(float(np.dot(losses.masses, np.exp(exponents - largest))))


def _least_epsilon(grid: np.ndarray, masses: np.ndarray, fixed: float, delta: float) -> float:
    """Bisection of δ(ε) = fixed + Σ_{l > ε} mass · (1 − e^(ε − l)), which falls in ε."""

    def delta_at(epsilon: float) -> float:
        above = grid > epsilon
        return fixed + float(np.dot(masses[above], -np.expm1(epsilon - grid[above])))

    if fixed > delta:
        return math.inf
    if delta_at(0.0) <= delta:
        return 0.0
    low, high = 0.0, max(float(grid[-1]), 0.0)
    while high - low > 1e-9 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high
