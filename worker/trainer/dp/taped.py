"""Parameters that notice how they are used.

While a batch runs, each trainable parameter is replaced in its modules by a `Taped` tensor of the same values.
Functions that touch one are looked up in a table (`layers.HANDLERS`); any other function that would compute with it
raises EngineError, so that no gradient is lost in silence. Everything else runs at its usual speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from worker.trainer.dp.engine import EngineError
from worker.trainer.dp.tape import Tape

Handler = Callable[..., Any]


class Taped(Tensor):
    """A trainable parameter's values, or their shift or cast: of derivative one with respect to the parameter."""

    parameter_name: str
    tape: Tape
    anchor: Tensor  # a leaf that requires grad: makes autograd visit uses whose input needs no gradient
    handlers: Mapping[Any, Handler]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = _first_taped(args, kwargs)
        handler = first.handlers.get(func)
        if handler is not None:
            return handler(func, *args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            used = getattr(func, "__name__", "an operation")
            raise EngineError("unsupported_use", f"used by {used}", [first.parameter_name])
        return result

    def values(self) -> Tensor:
        """The same memory as a plain tensor without gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def derived(self, values: Tensor) -> Taped:
        """Other values, same parameter, derivative one."""
        return _taped(values, self)


def _first_taped(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Taped:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Taped):
            return value
        if isinstance(value, list | tuple):
            for item in value:
                if isinstance(item, Taped):
                    return item
    raise AssertionError("dispatched without a taped parameter")


def _taped(values: Tensor, like: Taped) -> Taped:
    result: Taped = torch.Tensor._make_subclass(Taped, values.detach())
    result.parameter_name, result.tape = like.parameter_name, like.tape
    result.anchor, result.handlers = like.anchor, like.handlers
    return result


def plain(value: Any) -> Any:
    """A taped parameter as a plain tensor; anything else unchanged."""
    return value.values() if isinstance(value, Taped) else value


@contextmanager
def taped_parameters(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], tape: Tape, handlers: Mapping[Any, Handler]
) -> Iterator[None]:
    """Swaps the parameters of `model` for taped ones, in every module that holds them; undone on leaving."""
    proxies: dict[int, Taped] = {}
    for name, parameter in parameters.items():
        proxy: Taped = torch.Tensor._make_subclass(Taped, parameter.detach())
        proxy.parameter_name, proxy.tape, proxy.handlers = name, tape, handlers
        proxy.anchor = torch.zeros((), device=parameter.device, requires_grad=True)
        proxies[id(parameter)] = proxy
    swapped: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    try:
        for module in model.modules():
            for key, held in list(module._parameters.items()):
                if held is not None and id(held) in proxies:
                    swapped.append((module._parameters, key, held))
                    module._parameters[key] = proxies[id(held)]  # type: ignore[assignment]
        yield
    finally:
        for holder, key, held in swapped:
            holder[key] = held
