"""Products by oneDNN: the same numbers to float32 rounding, in every place that the engine multiplies."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.trainer.dp.cases import CASES, build, to_dtype, trainable
from tests.trainer.dp.checks import check_loop, check_sensitivity, with_scale
from tests.trainer.dp.test_rounding import _cancelling, _loss
from worker.trainer.dp import products
from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.dp.functional import FunctionalEngine
from worker.trainer.dp.step import TOLERANCE

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every float32 product goes to oneDNN, whatever the processor and the size; what went there, by its work."""
    asked: list[int] = []
    by_onednn = products._by_onednn

    def noting(left: torch.Tensor, right: torch.Tensor, work: int) -> bool:
        goes = by_onednn(left, right, work)
        asked.extend([work] * goes)
        return goes

    monkeypatch.setattr(products, "ONEDNN", True)
    monkeypatch.setattr(products, "_MIN_WORK", 1)
    monkeypatch.setattr(products, "_by_onednn", noting)
    return asked


def test_products_equal_float64(calls: list[int]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 9, 16), torch.randn(12, 16), torch.randn(12)
    left = torch.randn(5, 9, 12)
    wide = [value.double() for value in (x, weight, bias, left)]
    pairs = [
        (products.linear(x, weight, bias), F.linear(*wide[:3])),
        (products.linear(left, weight.t()), wide[3] @ wide[1]),
        (products.linear(x.transpose(0, 1), weight), F.linear(wide[0].transpose(0, 1), wide[1])),
        (products.gram(x, torch.float32), wide[0] @ wide[0].transpose(1, 2)),
        (products.outer(left, x, torch.float32), wide[3].transpose(1, 2) @ wide[0]),
    ]
    target = torch.ones(12, 16)
    product = wide[3].reshape(-1, 12).t() @ wide[0].reshape(-1, 16)
    pairs.append((products.add_product(None, left.reshape(-1, 12), x.reshape(-1, 16)), product))
    first = (left[:, 0], x[:, 0])  # with gaps between the rows
    pairs.append((products.add_product(None, *first), wide[3][:, 0].t() @ wide[0][:, 0]))
    assert products.add_product(target, left.reshape(-1, 12), x.reshape(-1, 16)) is target
    pairs.append((target, 1.0 + product))
    for found, expected in pairs:
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) >= len(pairs)


def test_other_dtypes_stay_where_they_were(calls: list[int]) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(products.linear(x, x), F.linear(x, x))
    assert not calls


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen3_tied", "vit"])
def test_engine_equals_loop_over_units(name: str, calls: list[int]) -> None:
    model = build(name, dtype=torch.float32)
    batch = to_dtype(CASES[name].batch(6), torch.float32)
    for unit_index in (torch.arange(6), torch.tensor([40, 7, 7, 40, 7, 3])):
        check_loop(BookKeepingEngine, model, trainable(model), CASES[name].loss, batch, unit_index, 2e-5)
    assert len(calls) > 50


def test_sensitivity() -> None:
    model = build("bert", dtype=torch.float32)
    batch = to_dtype(CASES["bert"].batch(6), torch.float32)
    batch["scale"] = torch.tensor([1.0, 1e6, 1e-4, torch.inf, 30.0, torch.nan])
    loss = with_scale(CASES["bert"].loss)
    check_sensitivity(BookKeepingEngine, model, trainable(model), loss, batch, torch.arange(6), "flat")


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cancelling_records_stay_within_the_bound(scale: float) -> None:
    model = nn.Linear(64, 64, bias=False)
    engine = BookKeepingEngine(model, ["weight"], _loss, clipping="flat", max_grad_norm=1.0)
    for remainder in (0.0, 1e-7, 1e-5, 1e-3):
        batch = _cancelling(scale, remainder * scale)
        for row in range(12):
            engine.accumulate({key: value[row : row + 1] for key, value in batch.items()}, torch.tensor([row]))
            assert float(engine.take()["weight"].norm()) <= 1.0 + TOLERANCE


def test_frozen_layers_take_it_and_are_differentiated_through(calls: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.randn(6, 3, 8, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    assert not calls
    with products.FastLinear():
        found = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    assert calls
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_fallback_maps_over_fast_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """vmap refuses autograd functions like ours: the frozen layer takes torch's own product there."""
    monkeypatch.setattr(products, "ONEDNN", True)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    data = {"x": torch.randn(5, 6), "y": torch.arange(5) % 3}

    def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(module(batch["x"]), batch["y"], reduction="none")

    engine = FunctionalEngine(model, [n for n, _ in model.named_parameters()], loss, clipping="flat", max_grad_norm=1.0)
    engine.accumulate(data, torch.arange(5))
    expected = engine.take()
    with products.FastLinear():
        engine.accumulate(data, torch.arange(5))
    assert engine._mapped
    for name, value in engine.take().items():
        torch.testing.assert_close(value, expected[name])
    assert nn.functional.linear is products._LINEAR
