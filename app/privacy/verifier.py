"""ε recomputed from a stored event by accountants of their own: for an auditor, offline, with NumPy alone.

Nothing here is shared with the accountant that certified (dp-accounting), and neither torch nor Opacus is needed. Two
upper bounds: RDP, which is plain sums, and a privacy loss distribution on a grid, composed by FFT.

A report's other figures come from the same composition: ε at other δ, ε under replace_one, the trade-off curve.

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
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from app.privacy import trade_off
from app.privacy.renyi import Term, rdp_epsilon

#: Rounding of the FFT in float64, and what may wrap around its window; both are added to every δ.
_FFT_ALLOWANCE = 5e-12
_WRAPPED = 1e-13

#: Standard deviations of the noise that the grid of one mechanism covers; the rest is 1e-20.
_REACH = 9.3

#: All that a stored event may hold, by its type.
_FIELDS = {
    "no_op": {"type"},
    "gaussian": {"type", "noise_multiplier"},
    "poisson_sampled": {"type", "sampling_probability", "event"},
    "self_composed": {"type", "count", "event"},
    "composed": {"type", "events"},
}

#: Losses beyond this leave float64, and grids beyond this leave memory: no plan of ours has either.
_LARGEST_LOSS = 600.0
_LARGEST_GRID = 1 << 24

Relation = Literal["zero_out", "replace_one"]
_Direction = Literal["removing", "adding", "replacing"]

#: A pair of neighbours is looked at from both sides. Under replace_one the two sides are mirror images.
_DIRECTIONS: dict[Relation, tuple[_Direction, ...]] = {
    "zero_out": ("removing", "adding"),
    "replace_one": ("replacing",),
}

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
    terms = stored_terms(event)
    epsilon = composed(terms, discretization).epsilon(delta)
    return Recomputed(epsilon, rdp_epsilon(terms, delta), delta, discretization)


def stored_terms(event: Mapping[str, Any]) -> tuple[Term, ...]:
    """The Gaussian sums of a stored event. Raises ValueError for anything that is not such an event."""
    counts: Counter[tuple[float, float]] = Counter()

    def visit(node: Mapping[str, Any], count: int, rate: float | None) -> None:
        if not isinstance(node, dict) or node.keys() != _FIELDS.get(str(node.get("type"))):
            raise ValueError("not a stored event")
        match node:
            case {"type": "no_op"}:
                return
            case {"type": "gaussian", "noise_multiplier": float() | int() as sigma} if (
                type(sigma) is not bool and 0 < sigma < math.inf
            ):
                counts[(1.0 if rate is None else rate, float(sigma))] += count
            case {
                "type": "poisson_sampled",
                "sampling_probability": float(q),
                "event": {"type": "gaussian"} as inner,
            } if 0.0 < q < 1.0 and rate is None:
                visit(inner, count, q)
            case {"type": "self_composed", "count": int(times), "event": inner} if (
                type(times) is int and times >= 1 and rate is None
            ):
                visit(inner, count * times, None)
            case {"type": "composed", "events": [*parts]} if rate is None:
                for part in parts:
                    visit(part, count, None)
            case _:
                raise ValueError("not a stored event")

    visit(event, 1, None)
    return tuple(Term(q, sigma, count) for (q, sigma), count in sorted(counts.items()))


@dataclass(frozen=True, slots=True)
class Composed:
    """δ(ε) of composed terms: for each direction the grid of losses, their masses, and what counts as infinite."""

    directions: tuple[tuple[np.ndarray, np.ndarray, float], ...]

    def epsilon(self, delta: float) -> float:
        """The least ε whose δ, in every direction of the neighbouring relation, is at most `delta`."""
        return max((_least_epsilon(*direction, delta) for direction in self.directions), default=0.0)

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """What no membership attack surpasses at this false-positive rate."""
        if not self.directions:
            return false_positive_rate
        deltas = [
            max(_delta(*direction, float(epsilon)) for direction in self.directions) for epsilon in trade_off.EPSILONS
        ]
        return trade_off.true_positive_rate(np.minimum(1.0, deltas), false_positive_rate)


@lru_cache(maxsize=8)
def composed(terms: tuple[Term, ...], discretization: float, relation: Relation = "zero_out") -> Composed:
    """The terms, one after another, on a grid. Raises ValueError for what no grid of a sane size holds."""
    if not 1e-6 <= discretization <= 0.1:
        raise ValueError("discretization must lie in [1e-6, 0.1]")
    directions = _DIRECTIONS[relation] if terms else ()
    return Composed(tuple(_composed(terms, discretization, direction) for direction in directions))


@dataclass(frozen=True, slots=True)
class _Losses:
    """Masses on losses (first + i)·h, and the mass of an infinite loss."""

    first: int
    masses: np.ndarray
    infinite: float


def _composed(terms: Sequence[Term], h: float, direction: _Direction) -> tuple[np.ndarray, np.ndarray, float]:
    singles = [(_losses(term.sampling_probability, term.noise_multiplier, h, direction), term.count) for term in terms]
    log_finite = math.fsum(count * math.log1p(-losses.infinite) for losses, count in singles)
    low, high = _window(singles)
    size = 1 << (high - low).bit_length()
    if size > _LARGEST_GRID:
        raise ValueError("these losses need too large a grid at this discretization")
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    for losses, count in singles:
        # A circular convolution: masses are laid out by their loss modulo the window's size.
        laid = np.bincount((losses.first + np.arange(len(losses.masses))) % size, losses.masses, size)
        spectrum *= np.fft.rfft(laid) ** count
    masses = np.maximum(np.roll(np.fft.irfft(spectrum, size), -(low % size)), 0.0)
    return (low + np.arange(size)) * h, masses, -math.expm1(log_finite) + _WRAPPED + _FFT_ALLOWANCE


@dataclass(frozen=True, slots=True)
class _Pair:
    """The distributions of one sum along the noise's axis x, and their loss, which rises in x.

    Removing: P = (1−q) N(0, σ²) + q N(1, σ²) against Q = N(0, σ²). Adding is that swapped, which turns the loss round.
    Replacing: P against Q = (1−q) N(0, σ²) + q N(−1, σ²), the mirror image of P.
    """

    q: float
    sigma: float
    replacing: bool

    def loss(self, x: float) -> float:
        """ln of P's density over Q's."""
        up = self._log_mixture(x)
        return up - self._log_mixture(-x) if self.replacing else up

    def _log_mixture(self, x: float) -> float:
        """ln((1−q) + q e^((2x−1)/2σ²)): the density of P over that of N(0, σ²)."""
        rest = math.log1p(-self.q) if self.q < 1.0 else -math.inf
        return float(np.logaddexp(rest, math.log(self.q) + (2.0 * x - 1.0) / (2.0 * self.sigma**2)))

    def cuts(self, losses: np.ndarray) -> np.ndarray:
        """x at which the loss is each of `losses`; −∞ below the least loss there is."""
        if not self.replacing:
            odds = np.maximum(np.expm1(losses) / self.q, -1.0)
            with np.errstate(divide="ignore"):
                return self.sigma**2 * np.log1p(odds) + 0.5
        # With u = e^(x/σ²), c = q e^(−1/2σ²): (1−q + c u) = e^l (1−q + c/u), a quadratic in u. By symmetry for l ≥ 0.
        c = self.q * math.exp(-0.5 / self.sigma**2)
        gap = (1.0 - self.q) * np.expm1(np.abs(losses))
        root = (gap + np.sqrt(gap**2 + 4.0 * c**2 * np.exp(np.abs(losses)))) / (2.0 * c)
        return np.sign(losses) * self.sigma**2 * np.log(root)

    def cells(self, cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """P- and Q-mass between neighbouring cuts and, at both ends, of what lies outside: two more cells than gaps."""
        middle = _cells(cuts / self.sigma)
        p = (1.0 - self.q) * middle + self.q * _cells((cuts - 1.0) / self.sigma)
        if not self.replacing:
            return p, middle
        return p, (1.0 - self.q) * middle + self.q * _cells((cuts + 1.0) / self.sigma)


def _losses(q: float, sigma: float, h: float, direction: _Direction) -> _Losses:
    """One Poisson-sampled Gaussian sum."""
    pair = _Pair(q, sigma, replacing=direction == "replacing")
    ends = (pair.loss(-1.0 - _REACH * sigma if pair.replacing else -_REACH * sigma), pair.loss(1.0 + _REACH * sigma))
    sign = -1.0 if direction == "adding" else 1.0
    bottom, top = sorted(sign * end for end in ends)
    if not max(-bottom, top) <= _LARGEST_LOSS or (top - bottom) / h > _LARGEST_GRID:
        raise ValueError("these losses need too large a grid at this discretization")
    edges = np.arange(math.floor(bottom / h), math.ceil(top / h) + 1) * h
    p, q_mass = pair.cells(pair.cuts(sign * edges))
    if direction == "adding":
        p, q_mass = q_mass, p
    infinite = float(p[-1])
    p, q_mass = p[1:-1], q_mass[1:-1]
    # Cell (l, l + h]: low + high = P, low e^−l + high e^−(l+h) = Q. By e^l, which keeps the numbers near one.
    high_share = np.clip((p - q_mass * np.exp(edges[:-1])) / -math.expm1(-h), 0.0, p)
    masses = np.zeros(len(edges))
    masses[1:] += high_share
    masses[:-1] += p - high_share
    masses[0] += max(0.0, 1.0 - math.fsum(masses) - infinite)
    return _Losses(round(edges[0] / h), masses, infinite)


def _cells(z: np.ndarray) -> np.ndarray:
    """Standard normal mass between neighbouring cuts, which rise or fall, and at both ends beyond the last.

    By whichever tail cancels less.
    """
    scaled = (z / math.sqrt(2.0)).tolist()
    lower = np.array([0.5 * math.erfc(-value) for value in scaled])
    upper = np.array([0.5 * math.erfc(value) for value in scaled])
    inner = np.where(lower[1:] + lower[:-1] < 1.0, np.abs(np.diff(lower)), np.abs(np.diff(upper)))
    before, beyond = (lower[0], upper[-1]) if z[0] <= z[-1] else (upper[0], lower[-1])
    return np.concatenate([[before], inner, [beyond]])


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


def _delta(grid: np.ndarray, masses: np.ndarray, fixed: float, epsilon: float) -> float:
    """δ(ε) = fixed + Σ_{l > ε} mass · (1 − e^(ε − l)), which falls in ε."""
    start = int(np.searchsorted(grid, epsilon, side="right"))
    return fixed + float(np.dot(masses[start:], -np.expm1(epsilon - grid[start:])))


def _least_epsilon(grid: np.ndarray, masses: np.ndarray, fixed: float, delta: float) -> float:
    """Bisection of δ(ε)."""
    if fixed > delta:
        return math.inf
    if _delta(grid, masses, fixed, 0.0) <= delta:
        return 0.0
    low, high = 0.0, max(float(grid[-1]), 0.0)
    while high - low > 1e-9 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if _delta(grid, masses, fixed, middle) > delta else (low, middle)
    return high
