"""The dry step: before a private row is touched, the book-keeping engine is held against one backward for each row.

Synthetic rows, two batch sizes: a use that loses the batch dimension cannot pass both by a coincidence of shapes. What
is compared, parameter by parameter, are each row's norm and the sum over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.dp.engine import Batch, EngineError, LossFunction, check_losses

LossOfBatch = Callable[[Batch], Tensor]

_ROWS = 4
_LENGTH = 5


def stand_in(batch: Batch) -> dict[str, Tensor]:
    """Synthetic rows in the form of `batch`: names, dtypes and widths are taken from it, values never.

    Integers of two and more dimensions are short sequences of ids below 5, masks keep at least two tokens, vectors of
    integers are classes 0 and 1, floats are normal.
    """
    generator = torch.Generator().manual_seed(0)
    widths = sorted({value.shape[-1] for value in batch.values() if _is_sequence(value)})
    lengths = {width: min(width, _LENGTH + place) for place, width in enumerate(widths)}
    made: dict[str, Tensor] = {}
    for name, value in batch.items():
        if value.is_floating_point():
            fresh = torch.randn((_ROWS, *value.shape[1:]), generator=generator)
        elif "mask" in name and _is_sequence(value):
            fresh = torch.ones(_ROWS, *value.shape[1:-1], lengths[value.shape[-1]])
            fresh[0, ..., 2:] = 0
        elif _is_sequence(value) and "token_type" not in name:
            high = 2 if "label" in name else 5
            shape = (_ROWS, *value.shape[1:-1], lengths[value.shape[-1]])
            fresh = torch.randint(0, high, shape, generator=generator)
        elif _is_sequence(value):
            fresh = torch.zeros(_ROWS, *value.shape[1:-1], lengths[value.shape[-1]])
        else:
            fresh = torch.randint(0, 2, (_ROWS, *value.shape[1:]), generator=generator)
        made[name] = fresh.to(device=value.device, dtype=value.dtype)
    return made


def _is_sequence(value: Tensor) -> bool:
    return value.ndim >= 2 and not value.is_floating_point()


def verify(
    engine: BookKeepingEngine,
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    loss_fn: LossFunction,
    example: Batch,
) -> None:
    """EngineError `not_exact`, naming the parameters, where the engine and the loop disagree on `example`'s rows."""
    rows = min(len(value) for value in example.values())
    if rows < 3:
        raise ValueError("an example has at least three rows")
    with _deterministic(model):
        for count in (rows, rows - 1):
            batch = {name: value[:count] for name, value in example.items()}
            _compare(engine, parameters, lambda b: loss_fn(model, b), batch, count)


def _compare(
    engine: BookKeepingEngine, parameters: dict[str, nn.Parameter], loss: LossOfBatch, batch: Batch, rows: int
) -> None:
    device = next(iter(batch.values())).device
    tape, _ = engine.record(batch, torch.arange(rows, device=device))
    squared = tape.squared_norms()
    sums: dict[str, Tensor] = {}
    tape.add_clipped_sums({name: torch.ones_like(value) for name, value in squared.items()}, sums)
    norms: dict[str, list[Tensor]] = {name: [] for name in parameters}
    scale = 0.0
    for row in range(rows):  # one row's gradients at a time: a model is held here twice, not once for each row
        gradients = _row_gradients(parameters, loss, {k: v[row : row + 1] for k, v in batch.items()})
        for name, gradient in gradients.items():
            norms[name].append(gradient.norm())
            sums[name] -= gradient
        scale = max(scale, float(torch.stack([row_norms[-1] for row_norms in norms.values()]).norm()))
    wrong: list[str] = []
    for name, parameter in parameters.items():
        half = tape.half_precision or parameter.dtype in (torch.float16, torch.bfloat16)
        relative = 0.1 if half else 1e-3
        want = torch.stack(norms[name])
        allowed = relative * want + relative * 1e-2 * scale
        off = (squared[name].sqrt() - want).abs() > allowed
        if bool(off.any()) or float(sums[name].norm()) > float(allowed.sum()):
            wrong.append(name)
    if wrong:
        raise EngineError("not_exact", "gradients of rows differ from a loop over rows", wrong)


def _row_gradients(parameters: dict[str, nn.Parameter], loss: LossOfBatch, row: Batch) -> dict[str, Tensor]:
    value = check_losses(loss(row), 1)[0]
    gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
    if value.requires_grad:
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p, dtype=torch.float32)
        if g is None
        else g.to(torch.promote_types(g.dtype, torch.float32))
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }


@contextmanager
def _deterministic(model: nn.Module) -> Iterator[None]:
    """Dropout off; every module's mode restored on leaving."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
