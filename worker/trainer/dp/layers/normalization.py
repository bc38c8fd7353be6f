"""Scales and shifts of normalizing layers: always instantiated, one vector a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from worker.trainer.dp.engine import EngineError
from worker.trainer.dp.layers.elementwise import per_channel, per_row
from worker.trainer.dp.outer import cached_pieces
from worker.trainer.dp.taped import Taped, plain


def layer_norm(
    func: Any,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    taped = weight if isinstance(weight, Taped) else bias
    assert isinstance(taped, Taped)
    if x.shape[0] % taped.tape.rows:
        raise EngineError("lost_batch_dimension", "its input has no row dimension", [taped.parameter_name])
    names = (
        weight.parameter_name if isinstance(weight, Taped) else None,
        bias.parameter_name if isinstance(bias, Taped) else None,
    )
    shape = list(normalized_shape)
    result = _LayerNorm.apply(taped.anchor, x, shape, plain(weight), plain(bias), eps, taped.tape, names)
    assert isinstance(result, Tensor)
    return result


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        shape: list[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        tape: Any,
        names: tuple[str | None, str | None],
    ) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()  # autocast normalizes in float32
        result, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.shape, ctx.tape, ctx.names = shape, tape, names
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, mean, rstd, weight, bias = ctx.saved_tensors
        weight_name, bias_name = ctx.names
        tape = ctx.tape
        wide = torch.promote_types(gradient.dtype, torch.float32)
        by_row = (tape.rows, -1, *ctx.shape)
        if weight_name is not None:
            statistics = (tape.rows, -1, *mean.shape[mean.ndim - len(ctx.shape) :])
            by_rows = [
                tensor.reshape(form)
                for tensor, form in ((x, by_row), (mean, statistics), (rstd, statistics), (gradient, by_row))
            ]
            scale = [
                (a - m).mul_(r).mul_(g).sum(1, dtype=wide)
                for a, m, r, g in (
                    (tensor[piece] for tensor in by_rows)
                    for piece in cached_pieces(tape.rows, x.numel() // tape.rows, x.device)
                )
            ]
            tape.add_dense(weight_name, torch.cat(scale))
        if bias_name is not None:
            tape.add_dense(bias_name, gradient.reshape(by_row).sum(1, dtype=wide))
        to_input = None
        if ctx.needs_input_grad[1]:
            to_input = torch.ops.aten.native_layer_norm_backward(
                gradient.contiguous(), x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        return None, to_input, None, None, None, None, None, None


def rms_norm(
    func: Any, x: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    assert isinstance(weight, Taped)
    normalized = F.rms_norm(x, normalized_shape, None, eps)
    return normalized * per_row(weight, normalized)


def group_norm(
    func: Any,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _affine(F.group_norm(x, num_groups, None, None, eps), weight, bias)


def batch_norm(
    func: Any,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training:
        raise EngineError("couples_records", "batch normalization computes statistics over records")
    return _affine(F.batch_norm(x, running_mean, running_var, None, None, False, momentum, eps), weight, bias)


def _affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scale and shift by channel, (rows, channels, …), either of them trainable or not."""
    for operation, vector in ((torch.mul, weight), (torch.add, bias)):
        if isinstance(vector, Taped):
            normalized = operation(normalized, per_channel(vector, normalized))
        elif vector is not None:
            normalized = operation(normalized, vector.reshape(1, -1, *(1,) * (normalized.ndim - 2)))
    return normalized
