"""Σ_t left[r,t] ⊗ right[r,t] for each row, without writing it out where that is dearer: ghost norms and their sums.

‖Σ_t l_t ⊗ r_t‖² = Σ_{s,t} ⟨l_s, l_t⟩⟨r_s, r_t⟩: two Gram matrices of T × T instead of a matrix of l × r.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from worker.trainer.dp import products
from worker.trainer.dp.engine import UnitRows

Form = Literal["ghost", "instantiate"]

_CACHED = 1 << 18  # elements of one operand
_MAX_GATHERED = 1 << 24  # elements gathered at a time for cross terms between rows


class GramCache:
    """The last few Gram matrices by operand: query, key and value projections share their input."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []

    def gram(self, operand: Tensor, dtype: torch.dtype) -> Tensor:
        """operand @ operandᵀ for each row, (rows, T, T). Kept operands stay alive: equal addresses are equal data."""
        for index, (kept, gram) in enumerate(self._kept):
            if (
                kept.data_ptr() == operand.data_ptr()
                and kept.shape == operand.shape
                and kept.stride() == operand.stride()
                and kept.dtype == operand.dtype
            ):
                self._kept.insert(0, self._kept.pop(index))
                return gram
        result = products.gram(operand, dtype)
        self._kept = [(operand, result), *self._kept[:1]]
        return result

    def clear(self) -> None:
        """Lets go of operands and matrices."""
        self._kept = []


def cached_pieces(rows: int, width: int, device: torch.device) -> list[slice]:
    """Slices of rows, `width` elements each, that stay in a CPU's cache between operations; all rows elsewhere."""
    size = max(1, _CACHED // max(1, width)) if device.type == "cpu" else rows
    return [slice(start, start + size) for start in range(0, rows, size)]


def planned_form(*, rows: int, units: int, time: int, left: int, right: int) -> Form:
    """How a layer's norms are had: from Gram matrices, or from each unit's gradient written out.

    Written out, a gradient takes the place of the product that the clipped sum needs anyway, T·l·r a row, and the Gram
    matrices' T²(l + r) are saved. But it is held until all layers are visited, l·r a unit, where the factors
    are T(l + r) a row. So memory decides: 128 tokens and a square layer of 384 take the Gram matrices, 512 tokens,
    LoRA's narrow factors and units of many rows are written out. The numbers are the same (tests I and L).
    """
    return "instantiate" if units * left * right <= rows * time * (left + right) else "ghost"


def instantiates(left: Tensor, right: Tensor, units: UnitRows) -> bool:
    """Whether `planned_form` writes these out."""
    rows, time, width = left.shape
    form = planned_form(rows=rows, units=units.num_units, time=time, left=width, right=right.shape[2])
    return form == "instantiate"


def instantiate(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, l, r) in `dtype`."""
    return products.outer(left, right, dtype)


def instantiate_by_unit(left: Tensor, right: Tensor, units: UnitRows, dtype: torch.dtype) -> Tensor:
    """(units, l · r) in `dtype`: sums over each unit's rows, a few rows at a time."""
    numel = left.shape[2] * right.shape[2]
    total = torch.zeros(units.num_units, numel, dtype=dtype, device=left.device)
    size = max(1, _MAX_GATHERED // numel)
    for a, b, unit in zip(left.split(size), right.split(size), units.unit_of_row.split(size), strict=True):
        total.index_add_(0, unit, instantiate(a, b, dtype).flatten(1))
    return total


def joined(uses: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Several uses of one parameter as one, along T: cross terms between uses come with it."""
    if len(uses) == 1:
        return uses[0]
    return torch.cat([left for left, _ in uses], 1), torch.cat([right for _, right in uses], 1)


def row_pairs(units: UnitRows) -> tuple[Tensor, Tensor]:
    """Indices (i, j), i < j, of all pairs of rows that belong to the same unit."""
    same = units.unit_of_row[:, None] == units.unit_of_row[None, :]
    i, j = torch.nonzero(torch.triu(same, diagonal=1), as_tuple=True)
    return i, j


def squared_norm(
    left: Tensor, right: Tensor, units: UnitRows, grams: GramCache, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """‖Σ over the unit's rows of Σ_t l_t ⊗ r_t‖² and Σ ‖l_t‖‖r_t‖ over the same terms, each (units,)."""
    of_left, of_right = grams.gram(left, dtype), grams.gram(right, dtype)
    sizes = of_left.diagonal(dim1=1, dim2=2).mul(of_right.diagonal(dim1=1, dim2=2)).sqrt_().sum(1)
    squared = of_left.mul(of_right).sum((1, 2))
    if units.one_row_each:
        return squared, sizes
    result = torch.zeros(units.num_units, dtype=dtype, device=left.device)
    result.index_add_(0, units.unit_of_row, squared)
    i, j = row_pairs(units)
    size = max(1, _MAX_GATHERED // (left.shape[1] * (left.shape[2] + right.shape[2] + 2 * left.shape[1])))
    for a, b in zip(i.split(size), j.split(size), strict=True):
        of_left = torch.bmm(left[a].to(dtype), left[b].to(dtype).transpose(1, 2))
        of_right = torch.bmm(right[a].to(dtype), right[b].to(dtype).transpose(1, 2))
        result.index_add_(0, units.unit_of_row[a], 2.0 * of_left.mul_(of_right).sum((1, 2)))
    return result, torch.zeros_like(result).index_add_(0, units.unit_of_row, sizes)


def rounded_up(squared: Tensor, sizes: Tensor) -> Tensor:
    """A squared norm that rounding cannot have made too small. sizes: the sum of the norms of what was added up.

    Where terms cancel, the norm is far below them and rounding could report a long gradient as short: the sensitivity
    would break. A bound on the rounding is added instead; without cancellation it is invisible.
    """
    return squared.clamp(min=0.0) + 2.0 * torch.finfo(squared.dtype).eps * sizes.square()


def cross_gather(
    left: Tensor, right: Tensor, ids: Tensor, gradients: Tensor, units: UnitRows, dtype: torch.dtype
) -> Tensor:
    """(units,): ⟨Σ_s left_s ⊗ right_s, Σ_t onehot(ids_t) ⊗ gradients_t⟩ = Σ_{s,t} left_s[ids_t] ⟨right_s, gradients_t⟩.

    The cross term of a tied head (left: ∂L/∂logits) and embedding: T² d work, never vocabulary × d.
    """
    rows = torch.arange(len(left), device=left.device)
    pairs = [(rows, rows)]
    if not units.one_row_each:
        i, j = row_pairs(units)
        pairs += [(i, j), (j, i)]
    result = torch.zeros(units.num_units, dtype=dtype, device=left.device)
    size = max(1, _MAX_GATHERED // (left.shape[1] * (left.shape[2] + right.shape[2] + ids.shape[1])))
    for i, j in pairs:
        for a, b in zip(i.split(size), j.split(size), strict=True):
            picked = left[a].to(dtype).gather(2, ids[b][:, None, :].expand(-1, left.shape[1], -1))
            inner = torch.bmm(right[a].to(dtype), gradients[b].to(dtype).transpose(1, 2))
            result.index_add_(0, units.unit_of_row[a], picked.mul_(inner).sum((1, 2)))
    return result


def add_weighted_sum(
    left: Tensor, right: Tensor, row_factor: Tensor, row_blank: Tensor | None, target: Tensor | None
) -> Tensor:
    """target (flat) + Σ_r row_factor[r] Σ_t left[r,t] ⊗ right[r,t], in place; rows in `row_blank` are left out.

    Without a target the first product becomes it: the sum of a first batch is written once. Its dtype is row_factor's.
    """
    dtype = row_factor.dtype
    matrix = None if target is None else target.view(left.shape[2], right.shape[2])
    narrow_left = left.shape[2] <= right.shape[2]
    # Pieces large enough for a fast product, small enough for the scaled copy to stay in cache.
    split = left.dtype == right.dtype == torch.bfloat16 and products.on_tensor_cores(left, dtype)
    for piece in cached_pieces(len(left), left.shape[1] * min(left.shape[2], right.shape[2]) // 4, left.device):
        a, b = left[piece], right[piece]
        if not split:
            a, b = a.to(dtype), b.to(dtype)
        if row_blank is not None:
            # Zero times infinity is not zero: blank both operands.
            a = a.masked_fill(row_blank[piece, None, None], 0.0)
            b = b.masked_fill(row_blank[piece, None, None], 0.0)
        factor = row_factor[piece, None, None]
        if split:
            scale = factor.expand(-1, left.shape[1], 1).reshape(-1, 1)
            a, b = a.reshape(-1, a.shape[2]), b.reshape(-1, b.shape[2])
            matrix = products.add_scaled_product(matrix, a, b, scale, narrow_left)
            continue
        a, b = (a * factor, b) if narrow_left else (a, b * factor)
        matrix = products.add_product(matrix, a.reshape(-1, a.shape[2]), b.reshape(-1, b.shape[2]))
    assert matrix is not None
    return matrix.view(-1)
