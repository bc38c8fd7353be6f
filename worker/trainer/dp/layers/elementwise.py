"""Raw parameters in broadcast arithmetic: scales of norms, class tokens, learned positions, layer scales.

The parameter is given the batch dimension (a view, no copy) and autograd does the rest: the gradient of that view is
the gradient of each row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from worker.trainer.dp.engine import EngineError
from worker.trainer.dp.taped import Taped, plain


def broadcast(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An elementwise function of a parameter and a tensor that has the rows first."""
    if len(args) != 2 or kwargs:
        raise EngineError("unsupported_use", "elementwise arithmetic with options")
    first, second = args
    if isinstance(first, Taped) and isinstance(second, Tensor) and not isinstance(second, Taped):
        return func(per_row(first, second), second)
    if isinstance(second, Taped) and isinstance(first, Tensor) and not isinstance(first, Taped):
        return func(first, per_row(second, first))
    taped = first if isinstance(first, Taped) else second
    raise EngineError("unsupported_use", "arithmetic without rows", [taped.parameter_name])


def addition(func: Any, *args: Any, **kwargs: Any) -> Any:
    """As `broadcast`; a parameter plus a constant (Gemma's 1 + w) has derivative one and stays a parameter."""
    if len(args) == 2 and not kwargs:
        for taped, constant in (args, args[::-1]):
            if isinstance(taped, Taped) and isinstance(constant, int | float):
                return taped.derived(plain(taped) + constant)
    return broadcast(func, *args, **kwargs)


def cast(func: Any, taped: Any, *args: Any, **kwargs: Any) -> Any:
    """A cast between dtypes; a Taped argument elsewhere (x.type_as(w)) is read for its dtype only."""
    if not isinstance(taped, Taped):
        return func(taped, *(plain(arg) for arg in args), **kwargs)
    return taped.derived(func(plain(taped), *(plain(arg) for arg in args), **kwargs))


def expand(func: Any, taped: Any, *args: Any) -> Any:
    """A parameter with a leading dimension of one, expanded to the rows (class tokens)."""
    if not isinstance(taped, Taped) or taped.shape[0] != 1:
        raise EngineError("unsupported_use", "a parameter expanded along another dimension than the rows")
    result = func(_with_rows(taped, (taped.tape.rows, *taped.shape[1:])), *args)
    if result.shape[0] != taped.tape.rows:
        raise EngineError("lost_batch_dimension", "not expanded to the rows", [taped.parameter_name])
    return result


def per_row(taped: Taped, other: Tensor) -> Tensor:
    """The parameter shaped (rows, 1, …, *shape) so that it broadcasts against `other`, which has the rows first."""
    rows, shape = taped.tape.rows, tuple(taped.shape)
    if len(shape) == other.ndim and shape[0] == 1:
        shape = shape[1:]
    if other.ndim <= len(shape) or other.shape[0] != rows:
        raise EngineError("lost_batch_dimension", "used without a row dimension", [taped.parameter_name])
    return _with_rows(taped, (rows, *(1,) * (other.ndim - 1 - len(shape)), *shape))


def per_channel(taped: Taped, other: Tensor) -> Tensor:
    """A vector of channels shaped (rows, channels, 1, …) for `other` of shape (rows, channels, …)."""
    if other.shape[0] != taped.tape.rows:
        raise EngineError("lost_batch_dimension", "used without a row dimension", [taped.parameter_name])
    return _with_rows(taped, (taped.tape.rows, taped.shape[0], *(1,) * (other.ndim - 2)))


def _with_rows(taped: Taped, shape: tuple[int, ...]) -> Tensor:
    result = _Rows.apply(taped.anchor, plain(taped), shape, taped.tape, taped.parameter_name)
    assert isinstance(result, Tensor)
    return result


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, values: Tensor, shape: tuple[int, ...], tape: Any, name: str) -> Tensor:
        ctx.tape, ctx.name = tape, name
        return values.reshape(shape[1:]).expand(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        (gradient,) = gradients
        ctx.tape.add_dense(ctx.name, gradient)
        return None, None, None, None, None
