"""What the other tests of this folder show on a CPU, on a GPU: L and S on every family, and whole steps."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from tests.trainer.dp.cases import CASES, Batch, build, to_dtype, trainable
from tests.trainer.dp.checks import check_sensitivity, distance, with_scale
from tests.trainer.dp.oracles import clipped_sum, norm, unit_gradients
from tests.trainer.dp.test_exactness import ADAPTED
from tests.trainer.dp.training import Training
from worker.trainer.device import set_up_device
from worker.trainer.dp import outer
from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.dp.engines import make_engine
from worker.trainer.dp.step import rounding_tolerance
from worker.trainer.dp.verify import stand_in
from worker.trainer.spec import RuntimeOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
SEVERAL_ROWS = torch.tensor([40, 7, 7, 40, 7, 3])
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _as_a_job_does() -> None:
    set_up_device(RuntimeOptions(device="cuda", threads=1))


def _moved(batch: Batch) -> Batch:
    return {name: value.to(GPU) for name, value in batch.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=["f64", "f32"])
@pytest.mark.parametrize(("name", "lora"), ADAPTED)
def test_equals_the_loop_over_units_on_a_cpu(name: str, lora: bool, dtype: torch.dtype, tolerance: float) -> None:
    case = CASES[name]
    exact = build(name, lora=lora)
    names = trainable(exact)
    gradients = unit_gradients(exact, names, case.loss, to_dtype(case.batch(6), torch.float64), SEVERAL_ROWS)
    expected = torch.tensor([norm(gradient) for gradient in gradients], dtype=torch.float64)
    bound = float(expected.median())
    model = copy.deepcopy(exact).to(GPU, dtype)
    batch = _moved(to_dtype(case.batch(6), dtype))
    engine = make_engine(model, names, case.loss, clipping="flat", max_grad_norm=bound, example=stand_in(batch))
    assert isinstance(engine, BookKeepingEngine), engine.fallbacks
    values = engine.accumulate(batch, SEVERAL_ROWS.to(GPU))
    assert torch.allclose(values.squared_norms.double().sqrt().cpu(), expected, rtol=tolerance, atol=0.0)
    total = {parameter: value.cpu() for parameter, value in engine.take().items()}
    assert distance(total, clipped_sum(gradients, bound)) <= tolerance * bound * len(gradients)


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "lora"), ADAPTED)
def test_sensitivity(name: str, lora: bool, half: torch.dtype | None) -> None:
    model = build(name, lora=lora, dtype=torch.float32).to(GPU)
    batch = _moved(to_dtype(CASES[name].batch(6), torch.float32))
    for unit_index, extreme in ((torch.arange(6), 1e6), (SEVERAL_ROWS, 30.0)):
        batch["scale"] = torch.tensor([1.0, extreme, 1e-4, torch.inf, 30.0, torch.nan], device=GPU)
        check_sensitivity(
            partial(BookKeepingEngine, autocast_dtype=half),
            model,
            trainable(model),
            with_scale(CASES[name].loss),
            batch,
            unit_index.to(GPU),
            "flat",
            tolerance=rounding_tolerance(6, half_precision=half is not None),
        )


def test_clipped_sums_of_bfloat16_keep_what_cancels() -> None:
    """The scaled operand is rounded to 16 bits, not to 8: the sum of terms a thousand times longer is still right."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, 64, width, generator=generator).bfloat16() for width in (48, 32))
    left[:, 32:], right[:, 32:] = left[:, :32], -right[:, :32]  # every row cancels
    left[:, 0] += 0.01 * left[:, 1]  # but for a little
    factor = torch.tensor([0.3, 0.07, 1.9, 0.0])
    size = (left.double().norm(dim=2) * right.double().norm(dim=2)).sum(1)
    expected = torch.einsum("r,rtp,rtd->pd", factor.double(), left.double(), right.double())
    blank = factor == 0
    right[3, 0, 0] = torch.inf
    for swapped in (False, True):
        operands = (right, left) if swapped else (left, right)
        found = torch.zeros(48 * 32, device=GPU)
        found = outer.add_weighted_sum(*(x.to(GPU) for x in operands), factor.to(GPU), blank.to(GPU), found).cpu()
        found = found.view(32, 48).t() if swapped else found.view(48, 32)
        assert (found - expected).norm() <= 2.0**-17 * (size * factor).sum()
        assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_steps_are_those_of_a_cpu_and_the_same_each_time() -> None:
    weights = []
    for device in ("cpu", "cuda", "cuda"):
        job = Training(device=torch.device(device))
        for index in range(20):
            job.step(index)
        weights.append(job.weights().cpu())
    assert torch.allclose(weights[0], weights[1], rtol=1e-3, atol=1e-5)
    assert torch.equal(weights[1], weights[2])
    assert not torch.allclose(weights[0], Training().weights())
