"""What one backward pass leaves behind, by parameter, and the algebra on it: per-unit norms and clipped sums.

Autograd functions of `layers` write here *during backward* and hand on only the input's gradient, so that no unclipped
weight gradient ever exists and recomputed (checkpointed) forwards leave no trace. A use of a parameter takes one of
three forms, each the gradient of every row r:

- dense:  G_r itself, (rows, numel)
- outer:  Σ_t left[r,t] ⊗ right[r,t]: a linear layer's output gradients and inputs
- gather: Σ_t onehot(ids[r,t]) ⊗ g[r,t]: an embedding

Uses of one parameter add up before the norm is taken (tied embedding and head, layers used twice), and so do the rows
of one unit: cross terms are exact. See Bu et al. 2023 (book-keeping), Goodfellow 2015, Li et al. 2022 (ghost norm).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from worker.trainer.dp import outer
from worker.trainer.dp.engine import EngineError, UnitRows


@dataclass(slots=True)
class Uses:
    """All uses of one parameter in one backward pass."""

    shape: torch.Size
    dtype: torch.dtype  # of norms and sums: float32 or better
    dense: Tensor | None = None  # (units, numel)
    outers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (rows, T, l), (rows, T, r); l·r = numel
    gathers: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (rows, T), (rows, T, d)


class Tape:
    """Collects uses during one backward pass over a physical batch."""

    def __init__(self, parameters: dict[str, Tensor], units: UnitRows, loss_scale: float = 1.0) -> None:
        """loss_scale: what the losses were multiplied with; norms and sums are given without it."""
        self.units = units
        self._loss_scale = loss_scale
        self.rows = len(units.unit_of_row)
        self._uses = {
            name: Uses(value.shape, torch.promote_types(value.dtype, torch.float32))
            for name, value in parameters.items()
        }
        self._grams = outer.GramCache()
        self.half_precision = False  # whether any gradient came in bfloat16 or float16

    def add_dense(self, name: str, rows: Tensor) -> None:
        """rows: (rows, *parameter shape), the gradient of each row."""
        uses = self._uses[name]
        flat = rows.detach().reshape(self.rows, -1).to(uses.dtype)
        if flat.shape[1] != uses.shape.numel():
            raise EngineError("lost_batch_dimension", "its gradient has no row dimension", [name])
        if not self.units.one_row_each:
            total = torch.zeros(self.units.num_units, flat.shape[1], dtype=flat.dtype, device=flat.device)
            flat = total.index_add_(0, self.units.unit_of_row, flat)
        self._add_to_dense(uses, flat)

    @staticmethod
    def _add_to_dense(uses: Uses, units: Tensor) -> None:
        uses.dense = units if uses.dense is None else uses.dense + units

    def add_outer(self, name: str, left: Tensor, right: Tensor) -> None:
        """left: (rows, T, l), right: (rows, T, r); the parameter's shape, flattened, is l · r."""
        uses = self._uses[name]
        self._note_precision(left)
        left, right = left.detach(), right.detach()  # an input carries its graph: do not keep that alive
        if outer.instantiates(left, right, self.units):
            if self.units.one_row_each:
                self.add_dense(name, outer.instantiate(left, right, uses.dtype))
            else:
                self._add_to_dense(uses, outer.instantiate_by_unit(left, right, self.units, uses.dtype))
        else:
            uses.outers.append((left, right))

    def add_gather(self, name: str, ids: Tensor, gradients: Tensor) -> None:
        """ids: (rows, T); gradients: (rows, T, d), zero where an id takes no part (padding_idx)."""
        self._note_precision(gradients)
        self._uses[name].gathers.append((ids, gradients.detach()))

    def _note_precision(self, gradients: Tensor) -> None:
        self.half_precision |= gradients.dtype in (torch.float16, torch.bfloat16)

    def squared_norms(self) -> dict[str, Tensor]:
        """‖unit gradient‖² of each parameter, (units,). Complete only after the backward pass."""
        squared = {name: self._squared_norm(uses) for name, uses in self._uses.items()}
        return squared if self._loss_scale == 1.0 else {n: value / self._loss_scale**2 for n, value in squared.items()}

    def _squared_norm(self, uses: Uses) -> Tensor:
        if uses.dense is not None and (uses.outers or uses.gathers):
            self._make_dense(uses)
        if uses.dense is not None:
            return uses.dense.square().sum(1)  # the very numbers that are summed: no margin
        device = self.units.unit_of_row.device
        total = torch.zeros(self.units.num_units, dtype=uses.dtype, device=device)
        sizes = torch.zeros_like(total)
        if uses.outers:
            left, right = outer.joined(uses.outers)
            total, sizes = outer.squared_norm(left, right, self.units, self._grams, uses.dtype)
        if uses.gathers:
            of_gathers, size = _gathered(uses, self.units)
            total, sizes = total + of_gathers, sizes + size
            for left, right in uses.outers:
                for ids, gradients in uses.gathers:
                    total += 2.0 * outer.cross_gather(left, right, ids, gradients, self.units, uses.dtype)
        return outer.rounded_up(total, sizes)

    def _make_dense(self, uses: Uses) -> None:
        """Adds outer and gathered uses to the dense one: a parameter with several forms of use and few elements."""
        assert uses.dense is not None
        dense = uses.dense
        for left, right in uses.outers:
            rows = outer.instantiate(left, right, uses.dtype)
            dense = dense.index_add(0, self.units.unit_of_row, rows.reshape(self.rows, -1))
        width = uses.shape[-1]
        for ids, gradients in uses.gathers:
            grid = dense.reshape(-1, width)
            slots = self.units.unit_of_row[:, None] * (uses.shape.numel() // width) + ids
            flat = gradients.reshape(-1, width).to(uses.dtype)
            dense = grid.index_add(0, slots.reshape(-1), flat).reshape(self.units.num_units, -1)
        uses.dense, uses.outers, uses.gathers = dense, [], []

    def add_clipped_sums(self, factors: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
        """sums[name] += Σ_u factors[name][u] · gradient_u. A unit with factor zero adds exactly nothing.

        A name without a sum gets one. Consumes the tape: what was added is let go of at once, so that the sums of a
        first batch take the place of what they were made of; the largest parameters come last.
        """
        self._grams.clear()
        weights: dict[tuple[int, torch.dtype], _Weights] = {}  # one for all parameters, but for per-layer clipping
        for name in sorted(self._uses, key=lambda name: self._uses[name].shape.numel()):
            uses = self._uses.pop(name)
            key = (id(factors[name]), uses.dtype)
            if key not in weights:
                weights[key] = _Weights.of(factors[name].to(uses.dtype) / self._loss_scale, self.units)
            weight = weights[key]
            target = sums[name].view(-1) if name in sums else None
            for left, right in uses.outers:
                target = outer.add_weighted_sum(left, right, weight.row_factor, weight.row_blank, target)
            if target is None:
                target = torch.zeros(uses.shape.numel(), dtype=uses.dtype, device=weight.factor.device)
            sums[name] = target.view(uses.shape)
            if uses.dense is not None:
                dense = uses.dense if weight.blank is None else uses.dense.masked_fill(weight.blank[:, None], 0.0)
                target.addmv_(dense.t(), weight.factor)
            for ids, gradients in uses.gathers:
                weighted = gradients.to(uses.dtype) * weight.row_factor[:, None, None]
                if weight.row_blank is not None:
                    weighted = weighted.masked_fill(weight.row_blank[:, None, None], 0.0)
                width = gradients.shape[-1]
                target.view(-1, width).index_add_(0, ids.reshape(-1), weighted.reshape(-1, width))


@dataclass(frozen=True, slots=True)
class _Weights:
    """Factors of units and of their rows; which are zero, where any is: a GPU is waited for once to know."""

    factor: Tensor
    blank: Tensor | None
    row_factor: Tensor
    row_blank: Tensor | None

    @classmethod
    def of(cls, factor: Tensor, units: UnitRows) -> _Weights:
        blank = factor == 0
        row_factor = factor[units.unit_of_row]
        if not bool(blank.any()):
            return cls(factor, None, row_factor, None)
        return cls(factor, blank, row_factor, blank[units.unit_of_row])


def _gathered(uses: Uses, units: UnitRows) -> tuple[Tensor, Tensor]:
    """‖Σ onehot(id) ⊗ g‖² and Σ ‖g‖, each (units,): gradients of equal (unit, id) are summed first."""
    vocabulary = uses.shape[0]
    keys = torch.cat([(units.unit_of_row[:, None] * vocabulary + ids).reshape(-1) for ids, _ in uses.gathers])
    values = torch.cat([g.reshape(-1, g.shape[-1]).to(uses.dtype) for _, g in uses.gathers])
    keys, order = torch.sort(keys, stable=True)
    # Runs of equal keys, numbered; as many places as keys, of which the last stay empty: a GPU need not be asked.
    run = torch.zeros_like(keys)
    run[1:] = (keys[1:] != keys[:-1]).cumsum(0)
    summed = torch.zeros_like(values).index_add_(0, run, values[order])
    unit_of_run = torch.zeros_like(keys).scatter_(0, run, keys // vocabulary)
    squared = torch.zeros(units.num_units, dtype=values.dtype, device=values.device)
    sizes = squared.index_add(0, keys // vocabulary, values.norm(dim=1)[order])
    return squared.index_add_(0, unit_of_run, summed.square().sum(1)), sizes


def total_squared(squared: Iterable[Tensor]) -> Tensor:
    """The squared norm over all parameters, (units,)."""
    return torch.stack(list(squared)).sum(0)
