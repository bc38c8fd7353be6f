"""S where rounding is at its worst: a record whose tokens' large gradients cancel must not slip under the clip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.dp.cases import Batch
from tests.trainer.dp.oracles import norm
from worker.trainer.dp import outer
from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.dp.step import TOLERANCE

WIDTH, TOKENS, ROWS = 64, 128, 12


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) * batch["coefficients"]).sum((1, 2))


def _cancelling(scale: float, remainder: float) -> Batch:
    """Gradient Σ_t coefficient_t ⊗ x_t of equal and opposite tokens, up to a remainder of another size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 1, WIDTH, generator=generator).expand(ROWS, TOKENS, WIDTH).clone()
    coefficients = torch.randn(ROWS, TOKENS // 2, WIDTH, generator=generator)
    coefficients = torch.cat([coefficients, -coefficients], 1) * scale
    coefficients += remainder * torch.randn(ROWS, TOKENS, WIDTH, generator=generator)
    return {"x": x, "coefficients": coefficients}


@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("unit_index", [torch.arange(ROWS), torch.arange(ROWS) // 3], ids=["rows", "units"])
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_cancelling_records_stay_within_the_bound(
    monkeypatch: pytest.MonkeyPatch, clipping: str, scale: float, unit_index: Tensor, ghost: bool
) -> None:
    monkeypatch.setattr(outer, "instantiates", lambda left, right, units: not ghost)
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    engine = BookKeepingEngine(model, ["weight"], _loss, clipping=clipping, max_grad_norm=1.0)
    for remainder in (0.0, 1e-7, 1e-5, 1e-3):
        batch = _cancelling(scale, remainder * scale)
        for unit in unit_index.unique():
            rows = unit_index == unit
            engine.accumulate({key: value[rows] for key, value in batch.items()}, unit_index[rows])
            assert norm(engine.take()) <= 1.0 + TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e8])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_cancelling_lookups_stay_within_the_bound(monkeypatch: pytest.MonkeyPatch, clipping: str, scale: float) -> None:
    """One word whose uses cancel, in an embedding that is tied to the head."""
    monkeypatch.setattr(outer, "instantiates", lambda left, right, units: False)
    model = nn.Embedding(300, WIDTH)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        looked_up = (module(batch["ids"]) * batch["coefficients"]).sum((1, 2))
        return looked_up + nn.functional.linear(batch["x"], module.weight)[:, :, 7].mul(batch["signs"]).sum(1)

    engine = BookKeepingEngine(model, ["weight"], loss, clipping=clipping, max_grad_norm=1.0)
    for remainder in (0.0, 1e-7, 1e-4):
        batch = _cancelling(scale, remainder * scale)
        batch["x"] = batch["x"] * scale
        batch["ids"] = torch.full((ROWS, TOKENS), 7)
        batch["signs"] = torch.ones(ROWS, TOKENS)
        batch["signs"][:, ::2] = -1.0
        for row in range(ROWS):
            engine.accumulate({key: value[row : row + 1] for key, value in batch.items()}, torch.tensor([row]))
            assert norm(engine.take()) <= 1.0 + TOLERANCE
