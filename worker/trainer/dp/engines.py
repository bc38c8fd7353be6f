"""Picks the gradient engine for a model: the single-backward one where it is exact, else the layer-blind one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.dp.engine import (
    Batch,
    EngineError,
    GradientEngine,
    LossFunction,
    UnitValues,
    trainable_parameters,
    zero_sums,
)
from worker.trainer.dp.functional import FunctionalEngine
from worker.trainer.dp.verify import stand_in, verify

#: What sends a model to the fallback; any other EngineError stops the job.
_FALLBACK_CODES = frozenset({"unsupported_use", "lost_batch_dimension", "not_exact"})


def make_engine(
    model: nn.Module,
    names: Sequence[str],
    loss_fn: LossFunction,
    *,
    clipping: str,
    max_grad_norm: float,
    example: Batch | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> GradientEngine:
    """An engine for the trainable parameters `names`; `.fallbacks` names parameters that forced the slow one.

    example: three or more synthetic rows for the dry step. Without it, the dry step comes with the first physical
    batch, on synthetic rows of that batch's form, and `.fallbacks` is empty until then.
    Raises EngineError where losses are not per record, a layer couples records or `names` are not what is trainable.
    """
    deferred = _Deferred(model, names, loss_fn, clipping, max_grad_norm, autocast_dtype)
    return deferred if example is None else deferred.choose(example)


class _Deferred:
    """Chooses at the first batch, before anything is summed."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        loss_fn: LossFunction,
        clipping: str,
        max_grad_norm: float,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self._model, self._names, self._loss_fn = model, names, loss_fn
        self._clipping, self._max_grad_norm = clipping, max_grad_norm
        self._autocast_dtype = autocast_dtype
        self._parameters = trainable_parameters(model, names)
        self._chosen: GradientEngine | None = None

    @property
    def fallbacks(self) -> tuple[str, ...]:
        return self._chosen.fallbacks if self._chosen is not None else ()

    @property
    def max_grad_norm(self) -> float:
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._max_grad_norm = value
        if self._chosen is not None:
            self._chosen.max_grad_norm = value

    def choose(self, example: Batch) -> GradientEngine:
        fast = BookKeepingEngine(
            self._model,
            self._names,
            self._loss_fn,
            clipping=self._clipping,
            max_grad_norm=self._max_grad_norm,
            autocast_dtype=self._autocast_dtype,
        )
        try:
            verify(fast, self._model, self._parameters, self._loss_fn, example)
        except EngineError as error:
            if error.code not in _FALLBACK_CODES:
                raise
            return FunctionalEngine(
                self._model,
                self._names,
                self._loss_fn,
                clipping=self._clipping,
                max_grad_norm=self._max_grad_norm,
                fallbacks=error.parameters or tuple(self._names),
            )
        return fast

    def accumulate(self, batch: Batch, unit_index: Tensor) -> UnitValues:
        if self._chosen is None:
            self._chosen = self.choose(stand_in(batch))
        return self._chosen.accumulate(batch, unit_index)

    def reset(self) -> None:
        if self._chosen is not None:
            self._chosen.reset()

    def take(self) -> dict[str, Tensor]:
        return zero_sums(self._parameters) if self._chosen is None else self._chosen.take()
