"""Modules whose own forward computes with a parameter before the batch dimension appears, and what to run instead.

T5's relative position bias looks its embedding up by (query, key) and broadcasts the result over the batch: autograd
would sum its gradient over all rows. Inside `rewritten` such methods give every row its own lookup, with equal values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from worker.trainer.dp.taped import Taped


class _Buckets(nn.Module):
    """Stands in for the bias embedding and returns the bucket indices themselves, one "head" wide."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, buckets: Tensor) -> Tensor:
        return buckets.unsqueeze(-1)


def _t5_compute_bias(module: nn.Module) -> Callable[..., Tensor]:
    original: Callable[..., Tensor] = module.compute_bias  # type: ignore[assignment]
    embedding: Any = module.relative_attention_bias

    def compute_bias(*args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(embedding.weight, Taped):
            return original(*args, **kwargs)
        rows = embedding.weight.tape.rows
        module._modules["relative_attention_bias"] = _Buckets(embedding.weight.values())
        try:
            buckets = original(*args, **kwargs)  # (1, 1, queries, keys)
        finally:
            module._modules["relative_attention_bias"] = embedding
        values: Tensor = embedding(buckets[0].expand(rows, *buckets.shape[2:]))
        return values.permute(0, 3, 1, 2)

    return compute_bias


#: method to replace, by the attribute that marks the module.
_REWRITES: dict[str, tuple[str, Callable[[nn.Module], Callable[..., Tensor]]]] = {
    "relative_attention_bias": ("compute_bias", _t5_compute_bias),
}


@contextmanager
def rewritten(model: nn.Module) -> Iterator[None]:
    """Replaces the methods listed above on the modules of `model`; undone on leaving."""
    replaced: list[tuple[nn.Module, str]] = []
    try:
        for module in model.modules():
            for marker, (method, build) in _REWRITES.items():
                if isinstance(getattr(module, marker, None), nn.Embedding) and hasattr(module, method):
                    setattr(module, method, build(module))
                    replaced.append((module, method))
        yield
    finally:
        for module, method in replaced:
            delattr(module, method)


def rows_first(position_ids: Tensor, rows: int) -> Tensor:
    """Ids shared by all rows, (1, T) or (T,), as (rows, T): what engines other than ours need for BERT and GPT-2."""
    return torch.atleast_2d(position_ids).expand(rows, -1)
