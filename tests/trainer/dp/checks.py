"""What privacy rests on, as functions of the implementation: tests call them on ours, mutation tests on mutants.

Each returns nothing and fails by assertion.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from app.privacy.plan import SampledGaussian
from tests.trainer.dp.cases import Batch
from tests.trainer.dp.oracles import clipped_sum, norm, unit_gradients
from tests.trainer.dp.training import PART, plan_for
from worker.trainer.dp.engine import GradientEngine
from worker.trainer.dp.randomness import JobRandomness
from worker.trainer.dp.step import TOLERANCE, PrivateStep

Loss = Callable[[nn.Module, Batch], Tensor]
MakeEngine = Callable[..., GradientEngine]


def with_scale(loss: Loss) -> Loss:
    """The loss times batch["scale"], (rows,): makes one record's gradient as long as a test wants."""

    def scaled(model: nn.Module, batch: Batch) -> Tensor:
        rest = {key: value for key, value in batch.items() if key != "scale"}
        return loss(model, rest) * batch["scale"]

    return scaled


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return norm({name: left[name].double() - right[name].double() for name in left})


def check_loop(
    make: MakeEngine, model: nn.Module, names: list[str], loss: Loss, batch: Batch, unit_index: Tensor, tolerance: float
) -> None:
    """L: norms and the clipped sum equal a loop over units; C is the median norm, so that some units are clipped."""
    gradients = unit_gradients(model, names, loss, batch, unit_index)
    expected = torch.tensor([norm(gradient) for gradient in gradients], dtype=torch.float64)
    bound = float(expected.median())
    engine = make(model, names, loss, clipping="flat", max_grad_norm=bound)
    norms = engine.accumulate(batch, unit_index).double().sqrt()
    assert torch.allclose(norms, expected, rtol=tolerance, atol=0.0)
    total = engine.take()
    assert set(total) == set(names)
    assert distance(total, clipped_sum(gradients, bound)) <= tolerance * bound * len(gradients)


def check_sensitivity(
    make: MakeEngine,
    model: nn.Module,
    names: list[str],
    loss: Loss,
    batch: Batch,
    unit_index: Tensor,
    clipping: str,
    tolerance: float = TOLERANCE,
) -> None:
    """S: leaving a unit out moves the clipped sum by at most the sensitivity; extreme and broken records included.

    Also: the largest record does reach the bound, so that the test could fail.
    """
    bound, sensitivity = (1.0, 1.0) if clipping == "automatic" else (0.5, 0.5)
    engine = make(model, names, loss, clipping=clipping, max_grad_norm=bound)
    engine.accumulate(batch, unit_index)
    whole = engine.take()
    assert all(bool(torch.isfinite(value).all()) for value in whole.values())
    moved = []
    for unit in dict.fromkeys(unit_index.tolist()):
        kept = unit_index != unit
        engine.accumulate({key: value[kept] for key, value in batch.items()}, unit_index[kept])
        moved.append(distance(whole, engine.take()))
    assert max(moved) <= sensitivity * (1.0 + tolerance)
    # By layers, one that no record uses leaves its share of the bound unused.
    assert max(moved) >= (0.5 if clipping == "per_layer" else 0.9) * sensitivity


class NoBatches:
    """An engine that was given nothing: what comes out of a step is the noise alone."""

    fallbacks: tuple[str, ...] = ()

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self._parameters = parameters

    def accumulate(self, batch: Batch, unit_index: Tensor) -> Tensor:
        raise AssertionError("an empty batch has no micro-batch")

    def reset(self) -> None:
        return

    def take(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value).detach() for name, value in self._parameters.items()}


def executed_noise(
    randomness: JobRandomness, steps: list[int], part: SampledGaussian = PART
) -> list[dict[str, Tensor]]:
    """What each of `steps` adds to the sum, from empty batches: the update of SGD with rate one, times the divisor."""
    parameters = {name: nn.Parameter(torch.zeros(200, 101)) for name in ("a.weight", "b.weight")}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    plan = plan_for(part)
    step = PrivateStep(NoBatches(parameters), optimizer, parameters, plan=plan, part=part, randomness=randomness)
    captured = []
    for index in steps:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.zero_()
        step.run(index, [])
        captured.append(
            {name: -value.detach().clone() * plan.expected_batch_size(part) for name, value in parameters.items()}
        )
    return captured


def check_noise(randomness: JobRandomness) -> None:
    """N: the plan's variance, Gaussian shape, independence across parameters and steps, nothing used twice."""
    samples = [
        noise[name].double().flatten().numpy()
        for noise in executed_noise(randomness, [0, 1, 7])
        for name in sorted(noise)
    ]
    std = PART.noise_multiplier * PART.max_grad_norm * (1.0 + TOLERANCE)
    for sample in samples:
        count = len(sample)
        assert len(np.unique(sample)) > 0.99 * count  # half precision has few values
        assert abs(sample.mean()) < 5 * std / math.sqrt(count)
        assert abs(sample.std() / std - 1.0) < 5 / math.sqrt(2 * count)
        assert stats.kstest(sample / std, "norm").pvalue > 1e-4
    for i, first in enumerate(samples):
        for second in samples[i + 1 :]:
            assert not np.array_equal(first, second)
            assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(len(first))
