"""Linear layers: torch's (out, in), and GPT-2's Conv1D through addmm, (in, out)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from worker.trainer.dp import products
from worker.trainer.dp.engine import EngineError
from worker.trainer.dp.taped import Taped, plain


def linear(func: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _apply(x, weight, bias, transposed=False)


def addmm(func: Any, bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta != 1 or alpha != 1:
        raise EngineError("unsupported_use", "addmm with factors")
    return _apply(x, weight, bias, transposed=True)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Tensor:
    taped = weight if isinstance(weight, Taped) else bias
    if not isinstance(taped, Taped) or isinstance(x, Taped):
        raise EngineError("unsupported_use", "a parameter as the input of a linear layer")
    if x.shape[0] % taped.tape.rows or x.ndim < 2:
        raise EngineError("lost_batch_dimension", "its input has no row dimension", [taped.parameter_name])
    names = (
        weight.parameter_name if isinstance(weight, Taped) else None,
        bias.parameter_name if isinstance(bias, Taped) else None,
    )
    if torch.is_autocast_enabled(x.device.type):
        # Cast once, so that what is saved is the half-precision input.
        x = x.to(torch.get_autocast_dtype(x.device.type))
    result = _Linear.apply(taped.anchor, x, plain(weight), plain(bias), taped.tape, names, transposed)
    assert isinstance(result, Tensor)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tape: Any,
        names: tuple[str | None, str | None],
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x if names[0] is not None else None, weight)
        ctx.tape, ctx.names, ctx.transposed = tape, names, transposed
        return products.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        tape, (weight_name, bias_name) = ctx.tape, ctx.names
        by_row = gradient.reshape(tape.rows, -1, gradient.shape[-1])
        if bias_name is not None:
            tape.add_dense(bias_name, by_row.sum(1, dtype=torch.promote_types(by_row.dtype, torch.float32)))
        if weight_name is not None:
            inputs = x.reshape(tape.rows, -1, x.shape[-1])
            if ctx.transposed:
                tape.add_outer(weight_name, inputs, by_row)
            else:
                tape.add_outer(weight_name, by_row, inputs)
        to_input = None
        if ctx.needs_input_grad[1]:
            weight = weight.to(gradient.dtype)
            to_input = products.linear(gradient, weight if ctx.transposed else weight.t())
        return None, to_input, None, None, None, None, None
