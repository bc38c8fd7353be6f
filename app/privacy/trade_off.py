"""The trade-off curve, as bounds that a person can read: at this false-positive rate, no better than that."""

from __future__ import annotations

import numpy as np

#: ε at which the curve δ(ε) is read. Any grid gives an upper bound; a finer one would change the fourth digit.
EPSILONS = np.concatenate([np.linspace(0.0, 4.0, 81), np.linspace(4.25, 20.0, 64)])


def true_positive_rate(deltas: np.ndarray, false_positive_rate: float) -> float:
    """The highest true-positive rate of any membership attack; `deltas`: δ at each of EPSILONS.

    Each (ε, δ) bounds TPR ≤ δ + e^ε·FPR and TPR ≤ 1 − e^−ε·(1 − δ − FPR) (Kairouz, Oh & Viswanath 2015); the least
    of these over a grid of ε is an upper bound whatever the grid.
    """
    direct = deltas + np.exp(EPSILONS) * false_positive_rate
    mirrored = 1.0 - np.exp(-EPSILONS) * (1.0 - deltas - false_positive_rate)
    return float(min(1.0, direct.min(), mirrored.min()))
