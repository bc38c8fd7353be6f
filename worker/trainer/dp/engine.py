"""What every gradient engine promises: sums of per-unit clipped gradients, and nothing un-clipped.

`loss_fn(model, batch)` returns one loss per record, shape (rows,). A physical batch holds whole units; the gradient of
a unit is the mean of its rows' gradients and is clipped once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
LossFunction = Callable[[nn.Module, Batch], Tensor]


class EngineError(ValueError):
    """The model, its loss or a batch breaks what per-unit clipping rests on.

    code: fixed, holds no data. parameters: names of those concerned, where they are known.
    """

    def __init__(self, code: str, message: str, parameters: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.parameters = tuple(parameters)


class UnitValues(NamedTuple):
    """What a physical batch's units came to, each (units,) in order of appearance. Private: it never leaves the job.

    squared_norms: of each unit's unclipped gradient, infinite where something was not finite.
    losses: mean over each unit's rows, float32 or better.
    """

    squared_norms: Tensor
    losses: Tensor


class GradientEngine(Protocol):
    """Accumulates Σ over units of the clipped unit gradient.

    fallbacks: trainable parameters that have no fast path here; the whole model then takes the slow one.
    max_grad_norm: C; adaptive clipping sets it between two steps.
    """

    max_grad_norm: float

    @property
    def fallbacks(self) -> tuple[str, ...]: ...

    def accumulate(self, batch: Batch, unit_index: Tensor) -> UnitValues:
        """Adds a physical batch of whole units. unit_index: (rows,) integers."""
        ...

    def reset(self) -> None:
        """Forgets what was accumulated."""
        ...

    def take(self) -> dict[str, Tensor]:
        """The sums since the last call, by parameter name, in float32 or better; starts again from zero."""
        ...


@dataclass(frozen=True, slots=True)
class UnitRows:
    """How the rows of a physical batch belong to its units.

    unit_of_row: (rows,) in [0, num_units), numbered in the order in which units first appear.
    weight_of_row: (rows,) float64, 1 / (rows of its unit): the sum of weighted rows is the mean.
    """

    unit_of_row: Tensor
    weight_of_row: Tensor
    num_units: int

    def mean(self, values: Tensor) -> Tensor:
        """Of each unit's rows, (units,); values: (rows,)."""
        total = torch.zeros(self.num_units, dtype=values.dtype, device=values.device)
        return total.index_add_(0, self.unit_of_row, values * self.weight_of_row.to(values.dtype))

    @property
    def one_row_each(self) -> bool:
        """Whether each row is its own unit: then there are no cross terms."""
        return self.num_units == len(self.unit_of_row)


def unit_rows(unit_index: Tensor) -> UnitRows:
    """Numbers the units of a physical batch; EngineError unless `unit_index` is a vector of integers."""
    if unit_index.ndim != 1 or unit_index.dtype not in (torch.int64, torch.int32):
        raise EngineError("bad_unit_index", "unit_index must be a vector of integers, one for each row")
    units, inverse, counts = torch.unique(unit_index, return_inverse=True, return_counts=True)
    weights = counts.to(torch.float64).reciprocal()[inverse]
    rows = torch.arange(len(unit_index), device=unit_index.device)
    first = torch.full_like(counts, len(unit_index)).scatter_reduce_(0, inverse, rows, "amin")
    rank = torch.empty_like(first)
    rank[torch.argsort(first)] = torch.arange(len(units), device=rank.device)
    return UnitRows(rank[inverse], weights, len(units))


def check_losses(losses: Any, rows: int) -> Tensor:
    """The losses, if there is one for each row; EngineError otherwise (a batch mean couples records)."""
    if not isinstance(losses, Tensor) or losses.shape != (rows,):
        raise EngineError("loss_not_per_record", "the loss function must return one loss for each record")
    if not losses.is_floating_point():
        raise EngineError("loss_not_per_record", "losses must be floating point")
    return losses


def trainable_parameters(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The named parameters; EngineError unless exactly these require gradients and no layer couples records."""
    parameters = dict(model.named_parameters())
    missing = sorted(set(names) - set(parameters))
    if missing or not names:
        raise EngineError("unknown_parameter", f"not parameters of the model: {missing}")
    trainable = {name for name, parameter in parameters.items() if parameter.requires_grad}
    if trainable != set(names):
        raise EngineError(
            "trainable_mismatch", f"requires_grad differs from the plan: {sorted(trainable ^ set(names))}"
        )
    check_records_independent(model)
    return {name: parameters[name] for name in names}


def check_records_independent(model: nn.Module) -> None:
    """EngineError where a layer mixes records or keeps running statistics of them."""
    for name, module in model.named_modules():
        mixes = isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or not module.track_running_stats
        )
        tracks = isinstance(module, nn.modules.instancenorm._InstanceNorm) and (
            module.track_running_stats and module.training
        )
        if mixes or tracks:
            raise EngineError("couples_records", f"{name or 'the model'} computes statistics over records")


def zero_sums(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous zeros in each parameter's shape, float32 or better."""
    return {
        name: torch.zeros(value.shape, dtype=torch.promote_types(value.dtype, torch.float32), device=value.device)
        for name, value in parameters.items()
    }
