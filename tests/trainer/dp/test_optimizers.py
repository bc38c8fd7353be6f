"""Optimizers, schedules and averages against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from worker.trainer.dp.optimizers import AdamBC, WeightAverage, learning_rate_factor, make_optimizer


def _step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradients: torch.Tensor) -> None:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()


def test_adam_bc_without_noise_is_adamw() -> None:
    gradients = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    ours, reference = nn.Parameter(torch.ones(7)), nn.Parameter(torch.ones(7))
    _step(AdamBC([ours], lr=0.1, weight_decay=0.01, noise_variance=0.0, floor=1e-30), ours, gradients)
    _step(torch.optim.AdamW([reference], lr=0.1, weight_decay=0.01), reference, gradients)
    assert torch.allclose(ours, reference, atol=1e-5)


def test_adam_bc_follows_the_paper() -> None:
    """m̂ / √max(v̂ − σ², γ') written out for a scalar."""
    gradients, rate, variance, floor = [0.5, -0.3, 0.8], 0.1, 0.04, 0.01
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AdamBC([parameter], lr=rate, eps=0.0, noise_variance=variance, floor=floor)
    first = second = value = 0.0
    for count, gradient in enumerate(gradients, start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        corrected = max(second / (1 - 0.999**count) - variance, floor)
        value -= rate * first / (1 - 0.9**count) / math.sqrt(corrected)
        _step(optimizer, parameter, torch.tensor([[gradient]], dtype=torch.float64))
    assert parameter.item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("name", ["adamw", "dp_adam_bc", "sgd"])
def test_optimizers_descend_and_resume(name: str) -> None:
    def run(steps: int, state: dict | None = None, start: torch.Tensor | None = None):
        parameter = nn.Parameter(torch.full((3,), 5.0) if start is None else start)
        optimizer = make_optimizer(name, [parameter], learning_rate=0.1)
        if state:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            _step(optimizer, parameter, 2 * parameter.detach()[None])
        return parameter.detach(), optimizer.state_dict()

    whole, _ = run(20)
    half, state = run(10)
    resumed, _ = run(10, state, half.clone())
    assert torch.equal(whole, resumed)
    assert float(whole.abs().max()) < 5.0


def test_unknown_optimizer_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        make_optimizer("lion", [nn.Parameter(torch.zeros(1))], learning_rate=0.1)


def test_schedules_depend_on_the_step_alone() -> None:
    rates = {
        name: [learning_rate_factor(name, step, num_steps=10, num_warmup_steps=2) for step in range(10)]
        for name in ("constant", "linear", "cosine")
    }
    assert rates["constant"] == [0.5, *[1.0] * 9]
    assert rates["linear"] == pytest.approx([0.5, 1.0, 1.0, *(1 - step / 8 for step in range(1, 8))])
    assert rates["cosine"][2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])


def test_average_is_bias_corrected_and_resumes() -> None:
    values = [torch.tensor([float(value)]) for value in (1, 2, 4, 8)]
    average = WeightAverage({"w": values[0]}, decay=0.5)
    with pytest.raises(ValueError, match="nothing"):
        average.average()
    for value in values[:2]:
        average.update({"w": value})
    resumed = WeightAverage({"w": values[0]}, decay=0.5)
    resumed.load_state_dict(average.state_dict())
    for value in values[2:]:
        resumed.update({"w": value})
    weights = [0.5**4, 0.5**3, 0.5**2, 0.5]
    expected = sum(w * float(v) for w, v in zip(weights, values, strict=True)) / sum(weights)
    target = {"w": nn.Parameter(torch.zeros(1))}
    resumed.copy_to(target)
    assert target["w"].item() == pytest.approx(expected)
