"""Embeddings, with positions that are shared by all rows expanded to the batch (BERT, GPT-2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from worker.trainer.dp.engine import EngineError
from worker.trainer.dp.taped import Taped, plain


def embedding(
    func: Any,
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if not isinstance(weight, Taped) or max_norm is not None or scale_grad_by_freq:
        raise EngineError("unsupported_use", "an embedding that renormalizes or counts frequencies")
    rows = weight.tape.rows
    if ids.ndim >= 2 and ids.shape[0] == 1 and rows != 1:
        # Ids without the batch dimension would leave one gradient summed over all rows.
        ids = ids.expand(rows, *ids.shape[1:])
    if ids.shape[0] != rows:
        raise EngineError("lost_batch_dimension", "its ids have no row dimension", [weight.parameter_name])
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    result = _Embedding.apply(weight.anchor, ids, plain(weight), padding_idx, weight.tape, weight.parameter_name)
    assert isinstance(result, Tensor)
    return result


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, ids: Tensor, weight: Tensor, padding_idx: int | None, tape: Any, name: str
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.tape, ctx.name = padding_idx, tape, name
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        (gradient,) = gradients
        (ids,) = ctx.saved_tensors
        ids = ids.reshape(ctx.tape.rows, -1)
        by_row = gradient.reshape(*ids.shape, gradient.shape[-1])
        if ctx.padding_idx is not None:
            by_row = by_row.masked_fill((ids == ctx.padding_idx)[:, :, None], 0.0)
        ctx.tape.add_gather(ctx.name, ids, by_row)
        return None, None, None, None, None, None
