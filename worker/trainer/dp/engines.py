"""Picks the gradient engine for a model: the fastest one that is exact on it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from worker.trainer.dp.engine import GradientEngine, LossFunction
from worker.trainer.dp.functional import FunctionalEngine


def make_engine(
    model: nn.Module, names: Sequence[str], loss_fn: LossFunction, *, clipping: str, max_grad_norm: float
) -> GradientEngine:
    """An engine for the trainable parameters `names`; `.fallbacks` names those that have no fast path.

    Raises EngineError where a parameter has no per-unit norm or a layer couples records.
    """
    return FunctionalEngine(model, names, loss_fn, clipping=clipping, max_grad_norm=max_grad_norm)
