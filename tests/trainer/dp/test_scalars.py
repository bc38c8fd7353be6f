"""What rides along with the gradient: losses and counts against a loop in float64, their bounds, their noise."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from app.privacy.plan import LossSum, PrivacyPlan, QuantileSum, SampledGaussian
from tests.trainer.dp.cases import CASES, Batch, build, to_dtype, trainable
from tests.trainer.dp.checks import RIDING, check_riders, check_scalar_noise, with_scale
from tests.trainer.dp.training import DATA, NUM_UNITS, PART, Training, plan_for
from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.dp.functional import FunctionalEngine
from worker.trainer.dp.optimizers import AdamBC
from worker.trainer.dp.scalars import adapted, centred_count, centred_losses
from worker.trainer.dp.step import TOLERANCE, noise_std

LOSS = LossSum(bound=1.5, share=1 / 64)
WITH_LOSS = dataclasses.replace(PART, loss=LOSS)
SEVERAL_ROWS = torch.tensor([40, 7, 7, 40, 7, 3])


@pytest.mark.parametrize("make", [BookKeepingEngine, FunctionalEngine])
@pytest.mark.parametrize("name", ["bert", "gpt2", "groupnorm"])
@pytest.mark.parametrize("unit_index", [torch.arange(6), SEVERAL_ROWS], ids=["rows", "units"])
def test_engines_tell_each_units_mean_loss(make, name: str, unit_index: Tensor) -> None:
    model = build(name)
    batch = to_dtype(CASES[name].batch(6), torch.float64)
    engine = make(model, trainable(model), CASES[name].loss, clipping="flat", max_grad_norm=1.0)
    told = engine.accumulate(batch, unit_index).losses
    rows = CASES[name].loss(model, batch).detach()
    units = list(dict.fromkeys(unit_index.tolist()))
    expected = torch.stack([rows[unit_index == unit].mean() for unit in units])
    assert torch.allclose(told, expected, rtol=1e-12)


@pytest.mark.parametrize("make", [BookKeepingEngine, FunctionalEngine])
def test_a_unit_moves_the_sums_by_no_more_than_the_plan_says(make) -> None:
    """S: extreme, negative and broken losses included; one unit does reach the bound."""
    model = build("bert", dtype=torch.float32)
    batch = CASES["bert"].batch(6)
    batch["scale"] = torch.tensor([1.0, 1e6, -3.0, torch.inf, 1e-9, torch.nan])

    made = make(model, trainable(model), with_scale(CASES["bert"].loss), clipping="flat", max_grad_norm=1.0)

    def engine(batch: Batch, unit_index: Tensor) -> Tensor:
        return made.accumulate(batch, unit_index).losses

    for unit_index in (torch.arange(6), SEVERAL_ROWS):
        whole = centred_losses(engine(batch, unit_index), LOSS).sum()
        moved = []
        for unit in unit_index.unique():
            kept = unit_index != unit
            rest = engine({key: value[kept] for key, value in batch.items()}, unit_index[kept])
            moved.append(float((whole - centred_losses(rest, LOSS).sum()).abs()))
        assert max(moved) <= LOSS.bound / 2 * (1 + TOLERANCE)
        assert max(moved) >= LOSS.bound / 2 * (1 - TOLERANCE)


def test_a_loss_that_is_not_finite_counts_as_the_bound() -> None:
    losses = torch.tensor([-2.0, 0.0, 0.4, 1.5, 9.0, torch.inf, -torch.inf, torch.nan])
    centred = centred_losses(losses, LOSS) + LOSS.bound / 2
    assert centred.tolist() == pytest.approx([0.0, 0.0, 0.4, 1.5, 1.5, 1.5, 1.5, 1.5])
    assert centred_losses(losses, LOSS).dtype == torch.float64


def test_steps_release_the_loop_over_units_but_for_the_noise() -> None:
    check_riders(dataclasses.replace(RIDING, clipping="flat", quantile=None))


def test_adaptive_steps_are_the_loop_over_units_with_noise_that_follows_the_bound() -> None:
    check_riders(RIDING)
    check_riders(dataclasses.replace(RIDING, loss=None))


@pytest.mark.parametrize("now", [0.9, 0.05, 7.0])
@pytest.mark.parametrize(
    ("part", "gradient"),
    [(PART, 1.0), (WITH_LOSS, 63 / 64), (RIDING, 61 / 64), (dataclasses.replace(RIDING, loss=None), 62 / 64)],
    ids=["alone", "loss", "both", "count"],
)
def test_all_that_is_noised_together_is_one_mechanism(part: SampledGaussian, gradient: float, now: float) -> None:
    """E: Σ (Δ / s)² of what is executed is the σ⁻² that is accounted, whatever the bound has come to."""
    plan = plan_for(part)
    sensitivities = {"gradient": now, "loss": part.loss.bound / 2 if part.loss else 0.0, "quantile": 0.5}
    stds = {name: noise_std(plan, part, name, max_grad_norm=now) for name in part.noise_multipliers}
    spent = sum((sensitivities[name] * (1 + TOLERANCE) / std) ** 2 for name, std in stds.items())
    assert spent == pytest.approx(part.noise_multiplier**-2, rel=1e-12)
    assert stds["gradient"] == pytest.approx(2.0 * now / math.sqrt(gradient) * (1 + TOLERANCE))


def test_the_bound_finds_the_median_whatever_it_starts_from() -> None:
    """On fixed norms, with hardly any noise: the geometric update converges to the quantile."""
    norms = torch.linspace(0.2, 4.0, 401, dtype=torch.float64)
    for quantile in (0.5, 0.9):
        rider = QuantileSum(share=1 / 64, target_quantile=quantile, learning_rate=0.2)
        for start in (1e-2, 30.0):
            bound = start
            for _ in range(250):
                bound = adapted(bound, float(centred_count(norms**2, bound).sum()), rider, len(norms), start)
            assert bound == pytest.approx(float(norms.quantile(quantile)), rel=0.02)


@pytest.mark.parametrize("total", [-1e9, 1e9])
def test_one_noisy_step_moves_the_bound_by_no_more_than_a_full_count_would(total: float) -> None:
    rider = QuantileSum(share=1 / 64, target_quantile=0.5, learning_rate=0.2)
    assert abs(math.log(adapted(1.0, total, rider, 10.0, 1.0))) == pytest.approx(0.1)
    bound = 1.0
    for _ in range(2000):
        bound = adapted(bound, total, rider, 10.0, 1.0)
    assert 1e-4 <= bound <= 1e4


def test_a_unit_moves_the_count_by_a_half() -> None:
    """S: whatever its norm, broken ones included."""
    for squared in (0.0, 0.8, 1.0, 1e30, torch.inf, torch.nan):
        assert abs(float(centred_count(torch.tensor([squared]), 1.0))) == 0.5


def test_the_bound_is_state_that_a_resumed_step_takes_over() -> None:
    whole, first, second = Training(RIDING), Training(RIDING), Training(RIDING)
    for index in range(4):
        whole.step(index)
    for index in range(2):
        first.step(index)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.private_step.max_grad_norm = first.private_step.max_grad_norm
    for index in range(2, 4):
        second.step(index)
    assert torch.equal(second.weights(), whole.weights())
    assert second.private_step.max_grad_norm == whole.private_step.max_grad_norm != RIDING.max_grad_norm


def test_the_optimizer_is_told_the_noise_of_the_step_at_hand() -> None:
    training = Training(RIDING)
    training.private_step._optimizer = optimizer = AdamBC(training.parameters.values(), lr=1e-3)
    for index in range(3):
        bound = training.private_step.max_grad_norm
        training.step(index)
        std = noise_std(training.plan, RIDING, max_grad_norm=bound) / training.plan.expected_batch_size(RIDING)
        assert optimizer.noise_variance == pytest.approx(std**2)


def test_the_noise_of_what_rides_along_is_the_plans_and_its_own() -> None:
    check_scalar_noise(dataclasses.replace(RIDING, sample_rate=1.0))


def test_the_loss_does_not_change_the_update_but_for_its_share_of_the_noise() -> None:
    """With the same noise multiplier on the gradient, weights are the same bits."""
    plain, riding = Training(), Training(dataclasses.replace(WITH_LOSS, noise_multiplier=2.0 * math.sqrt(63 / 64)))
    for index in range(3):
        assert plain.step(index).loss is None
        assert riding.step(index).loss is not None
    assert torch.allclose(plain.weights(), riding.weights(), atol=1e-7)


def test_an_empty_batch_releases_a_loss_too() -> None:
    released = Training(WITH_LOSS).private_step.run(0, [])
    assert released.loss is not None
    std = noise_std(plan_for(WITH_LOSS), WITH_LOSS, "loss") / (NUM_UNITS * WITH_LOSS.sample_rate)
    assert released.loss != LOSS.bound / 2
    assert abs(released.loss - LOSS.bound / 2) < 6 * std


def test_without_privacy_the_loss_is_exact() -> None:
    part = SampledGaussian("main", 1.0, 5, 0.0, 0.5, "none", loss=LOSS)
    training = Training(part, PrivacyPlan("none", NUM_UNITS, (part,)))
    losses = nn.functional.cross_entropy(training.model(DATA["x"]), DATA["y"], reduction="none").detach()
    assert training.step(0).loss == pytest.approx(float(losses.double().clamp(0, LOSS.bound).mean()), rel=1e-6)
