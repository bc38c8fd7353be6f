"""The single-backward engine: one forward, one backward, norms and clipped sums from the tape (Bu et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from worker.trainer.dp import products
from worker.trainer.dp.clipping import clip_factors_by_parameter
from worker.trainer.dp.engine import (
    Batch,
    EngineError,
    LossFunction,
    UnitValues,
    check_losses,
    check_records_independent,
    trainable_parameters,
    unit_rows,
    zero_sums,
)
from worker.trainer.dp.layers import HANDLERS
from worker.trainer.dp.rewrites import rewritten
from worker.trainer.dp.tape import Tape, total_squared
from worker.trainer.dp.taped import taped_parameters

#: Losses are multiplied with it where gradients are float16, which holds nothing below 6e-8: a public constant, where
#: the usual adaptive one would depend on the records. What overflows is not finite and contributes zero.
_FLOAT16_LOSS_SCALE = 1024.0


class BookKeepingEngine:
    """Exact on models whose trainable parameters are used by the functions of `layers.HANDLERS` only.

    autocast_dtype: compute in bfloat16 or float16; norms and sums stay in float32.
    """

    fallbacks: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        loss_fn: LossFunction,
        *,
        clipping: str,
        max_grad_norm: float,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self._model = model
        self._parameters = trainable_parameters(model, names)
        self._loss_fn = loss_fn
        self._clipping = clipping
        self.max_grad_norm = max_grad_norm
        self._autocast_dtype = autocast_dtype
        self._sums: dict[str, Tensor] = {}

    def accumulate(self, batch: Batch, unit_index: Tensor) -> UnitValues:
        tape, losses = self.record(batch, unit_index)
        squared = tape.squared_norms()
        # A loss that is not finite taints its unit even where the gradient happens to be.
        tainted = torch.zeros(tape.units.num_units, device=losses.device).index_add_(
            0, tape.units.unit_of_row, (~torch.isfinite(losses)).to(torch.float32)
        )
        by_name = torch.stack(list(squared.values())).masked_fill(tainted > 0, torch.inf)
        squared = dict(zip(squared, by_name.unbind(), strict=True))
        factors = clip_factors_by_parameter(self._clipping, squared, self.max_grad_norm)
        tape.add_clipped_sums(factors, self._sums)
        return UnitValues(total_squared(squared.values()), tape.units.mean(losses))

    def record(self, batch: Batch, unit_index: Tensor) -> tuple[Tape, Tensor]:
        """One forward and backward; the filled tape and the rows' losses, (rows,)."""
        check_records_independent(self._model)
        units = unit_rows(unit_index)
        scale = _FLOAT16_LOSS_SCALE if self._autocast_dtype is torch.float16 else 1.0
        tape = Tape(dict(self._parameters), units, scale)
        device = unit_index.device.type
        with (
            torch.enable_grad(),
            taped_parameters(self._model, self._parameters, tape, HANDLERS),
            rewritten(self._model),
            products.FastLinear(),
        ):
            with torch.autocast(device, self._autocast_dtype, enabled=self._autocast_dtype is not None):
                losses = check_losses(self._loss_fn(self._model, batch), len(unit_index))
            wide = losses.to(torch.promote_types(losses.dtype, torch.float32))
            if wide.requires_grad:  # else no trainable parameter took part, in any row
                (wide * (scale * units.weight_of_row).to(wide.dtype)).sum().backward()
        self._check_nothing_lost()
        return tape, wide.detach()

    def _check_nothing_lost(self) -> None:
        lost = [name for name, parameter in self._parameters.items() if parameter.grad is not None]
        for name in lost:
            self._parameters[name].grad = None
        if lost:
            raise EngineError("unsupported_use", "used outside the tape", lost)

    def reset(self) -> None:
        self._sums = {}

    def take(self) -> dict[str, Tensor]:
        sums, self._sums = self._sums or zero_sums(self._parameters), {}
        return {name: sums[name] for name in self._parameters}  # every rank in the same order
