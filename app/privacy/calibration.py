"""From a target (ε, δ) to noise: the smallest noise multiplier whose certified ε stays at or below the target.

ε is certified by PLD, evaluated only a handful of times: the RDP bound, a closed form, gives the start (a little too
much noise), a coarse PLD brings it near, the fine one decides. The same inputs give the same figures bit for bit, so
an estimate says exactly what a later submit certifies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from scipy import optimize, special

from app.privacy import renyi
from app.privacy.accountants import interval_for, pld_epsilon, require_delta
from app.privacy.dp_events import TRAINING, event_for, terms
from app.privacy.plan import Dataset, Part

Build = Callable[[float], tuple[Part, ...]]

#: The certified ε lies within this fraction below the target.
TOLERANCE = 0.002

#: Bounds of the main noise multiplier. Less noise than the lower one is no privacy worth the name.
MIN_SCALE = 0.2
MAX_SCALE = 1e5

_CACHE_SIZE = 1024


class CannotCalibrate(ValueError):
    """The parts whose noise is fixed already exceed the target ε."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A plan's parts with their noise, and the certificate: `epsilon` ≤ target at the target δ.

    scale: the main noise multiplier. discretization: interval of the PLD that certified. accountant: its name and
    version.
    """

    scale: float
    parts: tuple[Part, ...]
    epsilon: float
    accountant: str
    discretization: float


_cache: OrderedDict[str, Calibrated] = OrderedDict()
_cache_lock = threading.Lock()


def calibrate(
    build: Build, target_epsilon: float, target_delta: float, datasets: tuple[Dataset, ...] = TRAINING
) -> Calibrated:
    """The least noise, to four decimals, under which `build`'s parts cost at most (target_epsilon, target_delta).

    build: parts for a main noise multiplier; every part's noise must not fall as it rises. Parts outside `datasets` are
    kept in the plan but belong to another budget's event.
    The certified ε lies in [(1 − TOLERANCE) · target, target], or below that where MIN_SCALE is reached.
    Raises CannotCalibrate where even unlimited noise would not do, ValueError for a target that makes no sense.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0.0):
        raise ValueError("target_epsilon must be positive and finite")
    require_delta(target_delta)
    key = _digest(build, target_epsilon, target_delta, datasets)
    with _cache_lock:
        known = _cache.get(key)
        if known is not None and build(known.scale) == known.parts:
            _cache.move_to_end(key)
            return known
    found = _solve(build, target_epsilon, target_delta, datasets)
    with _cache_lock:
        _cache[key] = found
        while len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    return found


def clear_cache() -> None:
    """Forgets what was calibrated, for timing; figures do not depend on it."""
    with _cache_lock:
        _cache.clear()


def gaussian_noise_multiplier(epsilon: float, delta: float) -> float:
    """σ over the sensitivity of one Gaussian release that is (ε, δ)-DP: the analytic Gaussian mechanism.

    Balle & Wang 2018, Theorem 8: δ(ε) = Φ(1/2σ − εσ) − e^ε Φ(−1/2σ − εσ), solved for σ and rounded up.
    """
    if not (math.isfinite(epsilon) and epsilon > 0.0):
        raise ValueError("epsilon must be positive and finite")
    require_delta(delta)

    def excess(log_sigma: float) -> float:
        return gaussian_delta(math.exp(log_sigma), epsilon) - delta

    root = optimize.brentq(excess, math.log(1e-4), math.log(1e8), xtol=1e-12)
    return math.exp(float(root)) * (1.0 + 1e-10)  # a hundred times what the root and the tails may be off


def gaussian_delta(noise_multiplier: float, epsilon: float) -> float:
    """The exact δ at ε of one Gaussian release (Balle & Wang 2018, Theorem 8), by logarithms of the tails."""
    half, shift = 0.5 / noise_multiplier, epsilon * noise_multiplier
    log_first = float(special.log_ndtr(half - shift))
    log_second = epsilon + float(special.log_ndtr(-half - shift))
    return -math.exp(log_first) * math.expm1(min(0.0, log_second - log_first))


def _solve(build: Build, target: float, delta: float, datasets: tuple[Dataset, ...]) -> Calibrated:
    steps = sum(term.count for term in terms(event_for(build(1.0), datasets)))
    if steps == 0:
        raise ValueError("nothing to calibrate: no part touches these datasets")
    fine = interval_for(target, delta, steps)

    def certify(scale: float, interval: float) -> Calibrated:
        parts = build(scale)
        figure = pld_epsilon(event_for(parts, datasets), delta, discretization=interval)
        epsilon = math.ceil(figure.epsilon * 1e6) / 1e6  # six decimals: the same words on every machine
        return Calibrated(scale, parts, epsilon, figure.accountant, interval)

    start = _scale_by_rdp(build, target, delta, datasets)
    if start is None:
        # RDP is loose: only the PLD may say that the fixed parts are too much.
        if certify(MAX_SCALE, fine).epsilon > target:
            raise CannotCalibrate("the parts whose noise is fixed exceed target_epsilon")
        start = 10.0
    near, slope = _search(lambda scale: certify(scale, 8 * fine), start, -1.2, target, 5 * TOLERANCE)
    found, _ = _search(lambda scale: certify(scale, fine), near.scale, slope, target, TOLERANCE)
    return found


def _search(
    certify: Callable[[float], Calibrated], scale: float, slope: float, target: float, tolerance: float
) -> tuple[Calibrated, float]:
    """A certificate with ε in [(1 − tolerance) · target, target], and d ln ε / d ln scale as last measured.

    Secant steps on the logarithms, where ε is nearly a power law, kept inside a bracket. MIN_SCALE is the answer where
    ε stays below the target there; where the bracket closes to the scale's last digit, its safe end is.
    """
    aim = target * (1.0 - tolerance / 2.0)
    low, high = 0.0, math.inf  # ε(low) > target ≥ ε(high), as far as known
    safe: Calibrated | None = None
    previous: tuple[float, float] | None = None
    while True:
        scale = _rounded_up(min(max(scale, MIN_SCALE), MAX_SCALE))
        if not low < scale < high:
            scale = _rounded_up(math.sqrt(max(low, MIN_SCALE) * min(high, MAX_SCALE)))
        if safe is not None and scale >= high:
            return safe, slope
        tried = certify(scale)
        if tried.epsilon <= target:
            high, safe = scale, tried
            if tried.epsilon >= target * (1.0 - tolerance) or scale == MIN_SCALE:
                return tried, slope
        else:
            low = scale
        here = (math.log(scale), math.log(tried.epsilon / aim))
        if previous is not None and here[0] != previous[0]:
            slope = min((here[1] - previous[1]) / (here[0] - previous[0]), -0.05)
        previous = here
        scale = math.exp(min(here[0] - here[1] / slope, math.log(MAX_SCALE)))


def _scale_by_rdp(build: Build, target: float, delta: float, datasets: tuple[Dataset, ...]) -> float | None:
    """The scale at which RDP alone certifies the target: some per cent too much noise; None where no scale does."""
    order = renyi.best_order(target, delta)
    room = renyi.capacity(target, delta, order)

    if room <= 0.0:
        return None

    def excess(log_scale: float) -> float:
        parts = build(math.exp(log_scale))
        return math.log(renyi.total_divergence(terms(event_for(parts, datasets)), order) / room)

    low, high = math.log(MIN_SCALE), math.log(MAX_SCALE)
    if excess(high) > 0.0:
        return None
    if excess(low) <= 0.0:
        return MIN_SCALE
    return 0.93 * math.exp(float(optimize.brentq(excess, low, high, xtol=1e-2)))


def _rounded_up(scale: float) -> float:
    return math.ceil(scale * 1e4 - 1e-6) / 1e4


def _digest(build: Build, target: float, delta: float, datasets: tuple[Dataset, ...]) -> str:
    """Names the question: `build` by what it answers at two scales (a hit is checked against `build` once more)."""
    probes = [[dataclasses.asdict(part) for part in build(scale)] for scale in (1.0, 3.7)]
    question = json.dumps([probes, target, delta, list(datasets)], sort_keys=True)
    return hashlib.sha256(question.encode()).hexdigest()
