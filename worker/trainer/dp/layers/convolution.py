"""Convolutions in one and two dimensions, grouped as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn import grad

from worker.trainer.dp.engine import EngineError
from worker.trainer.dp.taped import Taped, plain

Pair = tuple[int, int]


def convolution(
    func: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Dimension by `func`: a 1-d convolution is a 2-d one of height one."""
    taped = weight if isinstance(weight, Taped) else bias
    assert isinstance(taped, Taped)
    flat = func is F.conv1d
    if x.ndim != (3 if flat else 4):
        raise EngineError("unsupported_use", "an unbatched input", [taped.parameter_name])
    if x.shape[0] != taped.tape.rows:
        raise EngineError("lost_batch_dimension", "its input has no row dimension", [taped.parameter_name])
    names = (
        weight.parameter_name if isinstance(weight, Taped) else None,
        bias.parameter_name if isinstance(bias, Taped) else None,
    )
    values = plain(weight)
    if flat:
        x, values = x.unsqueeze(2), values.unsqueeze(2)
    if padding == "valid":
        padding = 0
    elif padding == "same":  # the stride is one; an odd element goes behind
        around = [around * (size - 1) for around, size in zip(_pair(dilation, flat, 1), values.shape[2:], strict=True)]
        x = F.pad(x, (around[1] // 2, around[1] - around[1] // 2, around[0] // 2, around[0] - around[0] // 2))
        padding = 0
    sizes = (_pair(stride, flat, 1), _pair(padding, flat, 0), _pair(dilation, flat, 1))
    result = _Convolution.apply(taped.anchor, x, values, plain(bias), sizes, groups, taped.tape, names)
    assert isinstance(result, Tensor)
    return result.squeeze(2) if flat else result


def _pair(value: Any, flat: bool, neutral: int) -> Pair:
    values = (value,) if isinstance(value, int) else tuple(value)
    if flat:
        return (neutral, values[0])
    return (values[0], values[-1])


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sizes: tuple[Pair, Pair, Pair],
        groups: int,
        tape: Any,
        names: tuple[str | None, str | None],
    ) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ctx.save_for_backward(x, weight)
        ctx.sizes, ctx.groups, ctx.tape, ctx.names = sizes, groups, tape, names
        return F.conv2d(x, weight, bias, *sizes, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        tape, (weight_name, bias_name), groups = ctx.tape, ctx.names, ctx.groups
        stride, padding, dilation = ctx.sizes
        if bias_name is not None:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            tape.add_dense(bias_name, gradient.sum((2, 3), dtype=wide))
        if weight_name is not None and groups == 1:
            patches = F.unfold(x, weight.shape[2:], dilation, padding, stride)
            tape.add_outer(weight_name, gradient.flatten(2).transpose(1, 2), patches.transpose(1, 2))
        elif weight_name is not None:
            # Rows as further groups of one convolution: the gradient of each row in one call.
            rows, channels = x.shape[:2]
            per_row = grad.conv2d_weight(
                x.reshape(1, rows * channels, *x.shape[2:]),
                (rows * weight.shape[0], *weight.shape[1:]),
                gradient.reshape(1, rows * weight.shape[0], *gradient.shape[2:]),
                stride,
                padding,
                dilation,
                rows * groups,
            )
            tape.add_dense(weight_name, per_row.reshape(rows, *weight.shape))
        to_input = None
        if ctx.needs_input_grad[1]:
            weight = weight.to(gradient.dtype)
            to_input = grad.conv2d_input(x.shape, weight, gradient, stride, padding, dilation, groups)
        return None, to_input, None, None, None, None, None, None
