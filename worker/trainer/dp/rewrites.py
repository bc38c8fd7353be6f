"""Modules whose own forward computes with a parameter before the batch dimension appears, and what to run instead.

The relative position biases of T5 and MPNet look an embedding up by (query, key) and broadcast the result over the
batch: autograd would sum its gradient over all rows. Inside `rewritten` such methods give every row its own lookup,
with equal values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from worker.trainer.dp.taped import Taped


class _Buckets(nn.Module):
    """Stands in for the bias embedding and returns the bucket indices themselves, one "head" wide."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, buckets: Tensor) -> Tensor:
        return buckets.unsqueeze(-1)


def _bias_by_row(module: nn.Module, method: str) -> Callable[..., Tensor]:
    original: Callable[..., Tensor] = getattr(module, method)
    embedding: Any = module.relative_attention_bias

    def compute_bias(*args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(embedding.weight, Taped):
            return original(*args, **kwargs)
        rows = embedding.weight.tape.rows
        module._modules["relative_attention_bias"] = _Buckets(embedding.weight.values())
        try:
            buckets = original(*args, **kwargs)  # (1 or rows, 1, queries, keys)
        finally:
            module._modules["relative_attention_bias"] = embedding
        values: Tensor = embedding(buckets[:, 0].expand(rows, *buckets.shape[2:]))
        return values.permute(0, 3, 1, 2)

    return compute_bias


#: Methods to replace, T5's and MPNet's, by the attribute that marks the module: an embedding.
_REWRITES: dict[str, tuple[str, ...]] = {"relative_attention_bias": ("compute_bias", "compute_position_bias")}


@contextmanager
def rewritten(model: nn.Module) -> Iterator[None]:
    """Replaces the methods listed above on the modules of `model`; undone on leaving."""
    replaced: list[tuple[nn.Module, str]] = []
    try:
        for module in model.modules():
            for marker, methods in _REWRITES.items():
                for method in methods:
                    if isinstance(getattr(module, marker, None), nn.Embedding) and hasattr(module, method):
                        setattr(module, method, _bias_by_row(module, method))
                        replaced.append((module, method))
        yield
    finally:
        for module, method in replaced:
            delattr(module, method)
