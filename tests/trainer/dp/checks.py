"""What privacy rests on, as functions of the implementation: tests call them on ours, mutation tests on mutants.

Each returns nothing and fails by assertion.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from app.privacy.plan import LossSum, QuantileSum, SampledGaussian
from tests.trainer.dp.cases import Batch
from tests.trainer.dp.oracles import clipped_sum, norm, unit_gradients
from tests.trainer.dp.training import DATA, NUM_UNITS, PART, RANDOMNESS, Training, plan_for, record_loss
from worker.trainer.dp.engine import GradientEngine, UnitValues
from worker.trainer.dp.randomness import CLIP, LOSS, NOISE, JobRandomness
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
    norms = engine.accumulate(batch, unit_index).squared_norms.double().sqrt()
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

    def accumulate(self, batch: Batch, unit_index: Tensor) -> UnitValues:
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


#: Losses above the bound among them, and units on either side of the norm bound.
RIDING = dataclasses.replace(
    PART,
    max_grad_norm=1.45,
    clipping="adaptive",
    loss=LossSum(bound=0.9, share=1 / 64),
    quantile=QuantileSum(share=1 / 32, target_quantile=0.5, learning_rate=0.2),
)


def check_riders(part: SampledGaussian, steps: int = 4) -> None:
    """L and E: whole steps, everything that rides along included, equal a loop over units in float64, with the noise
    that the plan's split of its noise multiplier says."""
    training = Training(part)
    training.private_step._optimizer = torch.optim.SGD(training.parameters.values(), lr=1.0)
    names, divisor, bound = list(training.parameters), part.sample_rate * NUM_UNITS, part.max_grad_norm

    def noise(shape: torch.Size, sensitivity: float, share: float, step: int, stream: str, name: str = "") -> Tensor:
        drawn = torch.zeros(shape, dtype=torch.float64)
        std = part.noise_multiplier * sensitivity / math.sqrt(share) * (1.0 + TOLERANCE)
        RANDOMNESS.add_noise_(drawn, std, phase=part.name, step=step, stream=stream, name=name)
        return drawn

    seen: set[str] = set()
    left = 1.0 - sum(rider.share for rider in (part.loss, part.quantile) if rider is not None)
    for step in range(steps):
        model, units = copy.deepcopy(training.model).double(), training.drawn(step)
        batch = {key: value[units].double() if key == "x" else value[units] for key, value in DATA.items()}
        gradients = unit_gradients(model, names, record_loss, batch, units)
        losses = record_loss(model, batch).tolist()
        released = training.step(step)

        update = clipped_sum(gradients, bound)
        for name, before in model.named_parameters():
            total = update[name] + noise(before.shape, bound, left, step, NOISE, name)
            after = before.detach() - training.parameters[name].detach().double()
            assert torch.allclose(after, total / divisor, atol=1e-5)
        if part.loss is not None:
            top = part.loss.bound
            seen |= {"loss above" if loss > top else "loss below" for loss in losses}
            centred = sum(min(max(loss, 0.0), top) - top / 2 for loss in losses)
            total = centred + float(noise(torch.Size([1]), top / 2, part.loss.share, step, LOSS))
            assert released.loss is not None
            assert math.isclose(released.loss, top / 2 + total / divisor, rel_tol=1e-5)
        if part.quantile is not None:
            within = sum(0.5 if norm(gradient) <= bound else -0.5 for gradient in gradients)
            seen |= {"norm above" if norm(gradient) > bound else "norm below" for gradient in gradients}
            total = within + float(noise(torch.Size([1]), 0.5, part.quantile.share, step, CLIP))
            below = min(1.0, max(0.0, 0.5 + total / divisor))
            bound *= math.exp(-part.quantile.learning_rate * (below - part.quantile.target_quantile))
        assert math.isclose(training.private_step.max_grad_norm, bound, rel_tol=1e-9)
    assert len(seen) == 2 * (len(part.noise_multipliers) - 1)  # or nothing was clipped, or all of it


def check_scalar_noise(part: SampledGaussian, count: int = 1500) -> None:
    """N: over many empty steps, what rides along has the plan's variance, a stream of its own, and nothing twice."""
    part = dataclasses.replace(part, num_steps=count)
    plan = plan_for(part)
    divisor = plan.expected_batch_size(part)
    parameters = {"weight": nn.Parameter(torch.zeros(2))}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    step = PrivateStep(NoBatches(parameters), optimizer, parameters, plan=plan, part=part, randomness=RANDOMNESS)
    samples: dict[str, list[float]] = {"loss": [], "gradient": [], "quantile": []}
    for index in range(count):
        step.max_grad_norm = part.max_grad_norm
        before = float(parameters["weight"][0].detach())
        released = step.run(index, [])
        samples["gradient"].append((before - float(parameters["weight"][0].detach())) * divisor)
        if part.loss is not None:
            assert released.loss is not None
            samples["loss"].append((released.loss - part.loss.bound / 2) * divisor)
        if part.quantile is not None:
            drift = math.log(step.max_grad_norm / part.max_grad_norm) / -part.quantile.learning_rate
            samples["quantile"].append((drift + part.quantile.target_quantile - 0.5) * divisor)
    sensitivities = {"gradient": part.max_grad_norm, "quantile": 0.5, "loss": part.loss.bound / 2 if part.loss else 0}
    drawn = {name: np.array(values) for name, values in samples.items() if values}
    for name, values in drawn.items():
        std = part.noise_multipliers[name] * sensitivities[name] * (1.0 + TOLERANCE)  # type: ignore[index]
        assert len(np.unique(values)) == count
        assert abs(values.mean()) < 5 * std / math.sqrt(count)
        assert abs(values.std() / std - 1.0) < 5 / math.sqrt(2 * count)
        assert stats.kstest(values / std, "norm").pvalue > 1e-4
    names = list(drawn)
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            assert abs(np.corrcoef(drawn[name], drawn[other])[0, 1]) < 5 / math.sqrt(count)
