"""bfloat16 and float16 products: norms, sums and noise in float32, and a tolerance that covers the rounding."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tests.trainer.dp.cases import CASES, CLASSES, Batch, build, text_batch, trainable
from tests.trainer.dp.checks import RIDING, check_sensitivity, distance, with_scale
from tests.trainer.dp.oracles import norm, unit_gradients
from tests.trainer.dp.training import PART, plan_for
from worker.trainer.device import Device, set_up_device
from worker.trainer.dp import book_keeping
from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.dp.engines import make_engine
from worker.trainer.dp.step import TOLERANCE_HALF, noise_std, rounding_tolerance
from worker.trainer.dp.verify import stand_in
from worker.trainer.loop import _half_precision
from worker.trainer.spec import RuntimeOptions

HALVES = [torch.bfloat16, torch.float16]
NAMES = ["bert", "gpt2", "llama", "t5", "vit", "convnext", "resnet_group_norm"]
SEVERAL_ROWS = torch.tensor([40, 7, 7, 40, 7, 3])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sensitivity_holds_within_the_tolerance(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype=torch.float32)
    batch = CASES[name].batch(6)
    # Of a million, float16 overflows: the unit is left out whole.
    for unit_index, extreme in ((torch.arange(6), 1e6), (SEVERAL_ROWS, 30.0)):
        batch["scale"] = torch.tensor([1.0, extreme, 1e-4, torch.inf, 30.0, torch.nan])
        check_sensitivity(
            partial(BookKeepingEngine, autocast_dtype=dtype),
            model,
            trainable(model),
            with_scale(CASES[name].loss),
            batch,
            unit_index,
            "flat",
            tolerance=rounding_tolerance(6, half_precision=True),
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_norms_and_sums_are_float32_and_near_the_loops(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype=torch.float32)
    batch, loss = CASES[name].batch(6), CASES[name].loss
    names = trainable(model)
    expected = torch.tensor([norm(gradient) for gradient in unit_gradients(model, names, loss, batch, SEVERAL_ROWS)])
    engine = make_engine(
        model, names, loss, clipping="flat", max_grad_norm=1.0, example=stand_in(batch), autocast_dtype=dtype
    )
    assert isinstance(engine, BookKeepingEngine)
    norms = engine.accumulate(batch, SEVERAL_ROWS).squared_norms.sqrt()
    torch.testing.assert_close(norms, expected, rtol=0.1 if dtype is torch.bfloat16 else 0.02, atol=0.0)
    assert {value.dtype for value in engine.take().values()} == {torch.float32}


def _drift(dtype: torch.dtype | None, rows: int) -> float:
    """How far the clipped sum moves, in units of C, when products are added up in another order: here, when weights
    move by a float32's last bit."""
    config = hf.BertConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=40, pad_token_id=1, num_labels=CLASSES,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch, bound = text_batch(rows, length=16, seed=1), 1e-3  # all are clipped
    engine = BookKeepingEngine(
        model, trainable(model), CASES["bert"].loss, clipping="flat", max_grad_norm=bound, autocast_dtype=dtype
    )
    sums = []
    for _ in range(2):
        engine.accumulate(batch, torch.arange(rows))
        sums.append(engine.take())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0 + 2e-7 * torch.randn_like(parameter))
    return distance(*sums) / bound


@pytest.mark.parametrize("rows", [4, 48])
def test_the_tolerance_covers_how_rounding_moves_all_other_records(rows: int) -> None:
    for dtype in HALVES:
        assert 0.0 < _drift(dtype, rows) < rounding_tolerance(rows, half_precision=True)
    assert _drift(None, rows) < 0.1 * rounding_tolerance(rows, half_precision=False)
    assert _drift(torch.bfloat16, 48) > TOLERANCE_HALF, "a constant would not do"


def test_noise_covers_the_tolerance() -> None:
    plan = plan_for(PART)
    batch = plan.expected_batch_size(PART)
    ratio = noise_std(plan, PART, half_precision=True) / (PART.noise_multiplier * PART.max_grad_norm)
    assert ratio == pytest.approx(1.0 + TOLERANCE_HALF * batch**0.5)
    small = dataclasses.replace(PART, sample_rate=1e-4)
    ratio = noise_std(plan_for(small), small, half_precision=True) / (PART.noise_multiplier * PART.max_grad_norm)
    assert ratio == pytest.approx(1.0 + TOLERANCE_HALF)


class _Faint(nn.Module):
    """Gradients that vanish in float16, which ends at 6e-8, on their way to the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def _faint_loss(model: nn.Module, batch: Batch) -> Tensor:
    return 2e-8 * model(batch["x"])[:, 0].float()


def test_a_loss_scale_keeps_faint_gradients_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = _Faint(), {"x": torch.randn(5, 4)}
    names = trainable(model)
    expected = torch.tensor([norm(g) for g in unit_gradients(model, names, _faint_loss, batch, torch.arange(5))])

    def norms() -> Tensor:
        engine = BookKeepingEngine(
            model, names, _faint_loss, clipping="flat", max_grad_norm=1.0, autocast_dtype=torch.float16
        )
        squared = engine.accumulate(batch, torch.arange(5)).squared_norms
        total = engine.take()  # nothing is clipped: the sum is the loop's
        assert norm(total) <= float(squared.sqrt().sum()) * 1.001
        return squared.sqrt()

    torch.testing.assert_close(norms(), expected, rtol=0.03, atol=0.0)
    monkeypatch.setattr(book_keeping, "_FLOAT16_LOSS_SCALE", 1.0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(norms(), expected, rtol=0.03, atol=0.0)


def test_adaptive_clipping_and_heads_on_features_stay_in_float32() -> None:
    """Rounding to 16 bits would turn the bits of many units whose norms are near the bound."""
    job: Any = SimpleNamespace(device=Device(torch.device("cpu"), "bfloat16", 1))
    for part, on_features, half in ((PART, False, True), (PART, True, False), (RIDING, False, False)):
        prepared: Any = SimpleNamespace(part=part, on_features=on_features)
        assert _half_precision(job, prepared) is half


def test_float32_is_not_tf32() -> None:
    """By torch's default cuDNN convolves in TF32, whose rounding the tolerance of a float32 job does not cover."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    set_up_device(RuntimeOptions(device="cpu", threads=torch.get_num_threads()))
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
