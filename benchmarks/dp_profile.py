"""Where the CPU time of one private step goes, by part: what `dp_step --profile` prints.

The parts' own functions are timed where they stand, each without what it calls of another part, so that the shares add
up to the step. Products are told apart by whether autograd is going backward.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.optim import Optimizer

from worker.trainer.dp import outer, products, tape
from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.dp.layers import normalization
from worker.trainer.dp.randomness import JobRandomness

GRAMS, WRITTEN, SUMS = "ghost norms: Gram matrices", "gradients written out (norm and sum)", "clipped sums of products"
OF_PRODUCTS = (GRAMS, WRITTEN, SUMS)
REST = "copies, clip factors, book-keeping"
FORWARD, BACKWARD = "forward: attention, GELU, norms, loss", "backward: attention, GELU, norms, loss"


class _Clock:
    """Thread CPU seconds by part; a part within another stops the outer one's clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._parts: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Until left, time is `name`'s; a product within a part that is made of products is that part's."""
        if self._parts and self._parts[-1] in OF_PRODUCTS:
            name = self._parts[-1]
        self._switch()
        self._parts.append(name)
        try:
            yield
        finally:
            self._switch()
            self._parts.pop()

    def _switch(self) -> None:
        now = time.thread_time()
        if self._parts:
            self.seconds[self._parts[-1]] += now - self._since
        self._since = now


def _going_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _product(*_: Any) -> str:
    return "products for the input's gradient" if _going_backward() else "forward products"


def shares(step: Callable[[], None], optimizer: type[Optimizer], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each part of `step`, largest first; it is warm, and on one thread."""
    clock = _Clock()

    def timed(holder: Any, name: str, part: str | Callable[..., str]) -> Any:
        function = getattr(holder, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with clock.part(part if isinstance(part, str) else part(*args)):
                return function(*args, **kwargs)

        return mock.patch.object(holder, name, wrapper)

    patches = [
        timed(products, "linear", _product),
        timed(outer, "squared_norm", GRAMS),
        timed(outer, "instantiate", WRITTEN),
        timed(outer, "add_weighted_sum", SUMS),
        timed(tape, "_gathered", "embeddings: norms"),
        timed(BookKeepingEngine, "record", FORWARD),
        timed(torch.Tensor, "backward", BACKWARD),
        timed(normalization._LayerNorm, "backward", BACKWARD),
        timed(JobRandomness, "add_noise_", "noise"),
        timed(optimizer, "step", "optimizer"),
    ]
    found: dict[str, list[float]] = defaultdict(list)
    for patch in patches:
        patch.start()
    try:
        for _ in range(rounds):
            clock.seconds.clear()
            with clock.part(REST):
                step()
            for name, seconds in clock.seconds.items():
                found[name].append(seconds)
    finally:
        for patch in patches:
            patch.stop()
    medians = {name: statistics.median(values) for name, values in found.items()}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))
