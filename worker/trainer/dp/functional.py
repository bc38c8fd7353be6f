"""The engine that knows no layer types: whole gradients, one per row by vmap, or one per unit by plain autograd.

Slow and hungry, but exact for every differentiable model: what the tape cannot do falls back to this. Models whose
forward branches on data (transformers' attention masks do) cannot be mapped and are taken unit by unit.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from worker.trainer.dp.clipping import clip_factors_by_parameter
from worker.trainer.dp.engine import (
    Batch,
    LossFunction,
    UnitValues,
    check_losses,
    check_records_independent,
    trainable_parameters,
    unit_rows,
    zero_sums,
)


class _Loss(nn.Module):
    """Model and loss as one module, so that functional_call swaps the model's parameters under the loss function."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_fn(self.model, batch)


class FunctionalEngine:
    """Per-row gradients by vmap(grad), or per-unit ones by autograd. chunk_size: rows held at a time when mapped."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        loss_fn: LossFunction,
        *,
        clipping: str,
        max_grad_norm: float,
        chunk_size: int = 16,
        fallbacks: tuple[str, ...] = (),
    ) -> None:
        self.fallbacks = fallbacks
        self._parameters = trainable_parameters(model, names)
        self._model = model
        self._loss = _Loss(model, loss_fn)
        self._clipping = clipping
        self.max_grad_norm = max_grad_norm
        self._chunk_size = chunk_size
        self._mapped = True
        self._sums: dict[str, Tensor] = {}

    def _row_gradients(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients (rows, *parameter shape) by parameter name, and losses (rows,)."""

        def row_loss(parameters: dict[str, Tensor], row: dict[str, Tensor]) -> Tensor:
            one = {key: value.unsqueeze(0) for key, value in row.items()}
            swapped = {f"model.{name}": value for name, value in parameters.items()}
            return check_losses(functional_call(self._loss, swapped, (one,)), 1)[0]

        values = {name: parameter.detach() for name, parameter in self._parameters.items()}
        per_row: Any = vmap(grad_and_value(row_loss), in_dims=(None, 0), randomness="different")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # slow is what a fallback may be
            return per_row(values, batch)

    def accumulate(self, batch: Batch, unit_index: Tensor) -> UnitValues:
        check_records_independent(self._model)
        units = unit_rows(unit_index)
        self._sums = self._sums or zero_sums(self._parameters)
        rows = len(unit_index)
        dtype = next(iter(self._sums.values())).dtype
        weights = units.weight_of_row.to(dtype)
        # Whole units only, so that a unit's mean is complete before it is clipped.
        order = torch.argsort(units.unit_of_row, stable=True)
        sorted_units = units.unit_of_row[order]
        boundaries = torch.searchsorted(sorted_units, torch.arange(units.num_units + 1, device=order.device))
        ends = boundaries.tolist()
        squared = torch.zeros(units.num_units, dtype=dtype, device=order.device)
        losses = torch.zeros_like(squared)
        start = 0
        while start < units.num_units:
            stop = start + 1
            while stop < units.num_units and ends[stop + 1] - ends[start] <= self._chunk_size:
                stop += 1
            chosen = order[ends[start] : ends[stop]]
            inside = units.unit_of_row[chosen] - start
            chunk = {key: value[chosen] for key, value in batch.items()}
            squared[start:stop], losses[start:stop] = self._add(chunk, inside, weights[chosen], stop - start)
            start = stop
        assert ends[-1] == rows
        return UnitValues(squared, losses)

    def _unit_gradients(
        self, batch: dict[str, Tensor], unit_of_row: Tensor, weights: Tensor, num_units: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Mean gradient of each unit, (units, elements of the parameter), by parameter name; mean losses, (units,)."""
        if self._mapped:
            try:
                gradients, losses = self._row_gradients(batch)
                means = self._mean_of_rows(gradients, unit_of_row, weights, num_units)
                mean_losses = torch.zeros(num_units, dtype=weights.dtype, device=weights.device)
                return means, mean_losses.index_add_(0, unit_of_row, losses.detach().to(weights.dtype) * weights)
            except RuntimeError as error:
                if not str(error).startswith("vmap"):
                    raise
                self._mapped = False
        parameters = list(self._parameters.values())
        found: list[list[Tensor]] = []
        unit_losses: list[Tensor] = []
        for unit in range(num_units):
            rows = unit_of_row == unit
            losses = check_losses(self._loss({key: value[rows] for key, value in batch.items()}), int(rows.sum()))
            unit_losses.append(losses.detach().mean().to(weights.dtype))
            of_unit = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
            found.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, of_unit, strict=True)])
        means = {
            name: torch.stack([of_unit[i].reshape(-1) for of_unit in found]).to(self._sums[name].dtype)
            for i, name in enumerate(self._parameters)
        }
        return means, torch.stack(unit_losses)

    def _mean_of_rows(
        self, gradients: dict[str, Tensor], unit_of_row: Tensor, weights: Tensor, num_units: int
    ) -> dict[str, Tensor]:
        means: dict[str, Tensor] = {}
        for name, gradient in gradients.items():
            flat = gradient.detach().reshape(len(weights), -1).to(self._sums[name].dtype)
            flat = flat * weights.to(flat.dtype)[:, None]
            mean = torch.zeros(num_units, flat.shape[1], dtype=flat.dtype, device=flat.device)
            means[name] = mean.index_add_(0, unit_of_row, flat)
        return means

    def _add(
        self, batch: dict[str, Tensor], unit_of_row: Tensor, weights: Tensor, num_units: int
    ) -> tuple[Tensor, Tensor]:
        """Squared norms and mean losses of the units, whose clipped gradients are added."""
        with torch.enable_grad():
            means, losses = self._unit_gradients(batch, unit_of_row, weights, num_units)
        squared = {name: mean.square().sum(1).to(weights.dtype) for name, mean in means.items()}
        # A loss that is not finite taints its unit even where the gradient happens to be.
        squared = {name: value.masked_fill(~torch.isfinite(losses), torch.inf) for name, value in squared.items()}
        factors = clip_factors_by_parameter(self._clipping, squared, self.max_grad_norm)
        for name, mean in means.items():
            # Zero times infinity is not zero: a unit without a finite norm is blanked, not scaled.
            factor = factors[name][:, None].to(mean.dtype)
            kept = torch.where(factor > 0, mean * factor, 0.0)
            self._sums[name] += kept.sum(0).view_as(self._sums[name])
        return torch.stack(list(squared.values())).sum(0), losses

    def reset(self) -> None:
        self._sums = {}

    def take(self) -> dict[str, Tensor]:
        sums, self._sums = self._sums or zero_sums(self._parameters), {}
        return sums
