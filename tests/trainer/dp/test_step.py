"""E and resumption: a step is what the plan says, once, whatever was drawn and whatever ran before."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from app.privacy.plan import PrivacyPlan
from tests.trainer.dp.checks import check_noise, executed_noise
from tests.trainer.dp.training import DATA, NUM_UNITS, PART, RANDOMNESS, Training, plan_for, record_loss
from worker.trainer.dp.step import TOLERANCE, noise_std


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_job_ends_as_if_never_killed(dropout: float) -> None:
    whole = Training(dropout=dropout)
    for index in range(6):
        whole.step(index)
    for killed_after in range(6):
        first = Training(dropout=dropout)
        for index in range(killed_after):
            first.step(index)
        second = Training(dropout=dropout)
        second.model.load_state_dict(first.model.state_dict())
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        for index in range(killed_after, 6):
            second.step(index)
        assert torch.equal(second.weights(), whole.weights())


def test_an_abandoned_micro_batch_leaves_nothing() -> None:
    """Stopping in the middle of a logical batch: the replayed step is the step."""
    plain, interrupted = Training(), Training()

    def stops():
        yield {key: value[:3] for key, value in DATA.items()}, torch.arange(3)
        raise InterruptedError

    before = interrupted.weights()
    with pytest.raises(InterruptedError):
        interrupted.private_step.run(0, stops())
    assert torch.equal(interrupted.weights(), before)
    plain.step(0)
    interrupted.step(0)
    assert torch.equal(plain.weights(), interrupted.weights())


def test_the_update_does_not_depend_on_micro_batches() -> None:
    few, many = Training(), Training()
    few.step(0, size=100)
    many.step(0, size=1)
    assert torch.allclose(few.weights(), many.weights(), atol=1e-6)


def test_an_empty_batch_is_noised_steps_and_counts() -> None:
    training = Training()
    before = training.weights()
    training.private_step.run(0, [])
    assert not torch.equal(training.weights(), before)
    assert all(state["step"] == 1 for state in training.optimizer.state.values())


def test_the_divisor_is_the_plans_constant() -> None:
    """q · N of the plan, whatever was drawn: the same sum from twice the units gives half the update."""
    captured = [executed_noise(RANDOMNESS, [3])[0]["a.weight"]]  # multiplied by the divisor of 1000 units
    part = dataclasses.replace(PART, sample_rate=PART.sample_rate / 2)
    captured.append(executed_noise(RANDOMNESS, [3], part)[0]["a.weight"])
    assert torch.allclose(captured[0], captured[1], rtol=1e-5)


def test_noise_is_added_once_however_many_micro_batches() -> None:
    """The same rows in one and in sixty micro-batches differ by rounding, not by noise."""
    part = dataclasses.replace(PART, noise_multiplier=50.0, sample_rate=1.0)
    one, sixty = Training(part), Training(part)
    for training in (one, sixty):
        training.optimizer = torch.optim.SGD(training.parameters.values(), lr=1.0)
        training.private_step._optimizer = training.optimizer
    one.step(0, size=NUM_UNITS)
    sixty.step(0, size=1)
    assert torch.allclose(one.weights(), sixty.weights(), atol=1e-5)


def test_replaying_a_step_draws_the_same_noise_and_another_step_other_noise() -> None:
    check_noise(RANDOMNESS)
    first, again = executed_noise(RANDOMNESS, [4, 4])
    assert all(torch.equal(first[name], again[name]) for name in first)
    alone = executed_noise(RANDOMNESS, [9])[0]
    after = executed_noise(RANDOMNESS, [0, 1, 9])[2]
    assert all(torch.equal(alone[name], after[name]) for name in alone)


@pytest.mark.parametrize(("clipping", "sensitivity"), [("flat", 0.5), ("automatic", 1.0)])
def test_noise_follows_the_sensitivity(clipping: str, sensitivity: float) -> None:
    part = dataclasses.replace(PART, clipping=clipping)
    assert noise_std(plan_for(part), part) == pytest.approx(2.0 * sensitivity * (1 + TOLERANCE))


@pytest.mark.parametrize("step", [-1, 50])
def test_only_planned_steps_are_executed(step: int) -> None:
    with pytest.raises(ValueError, match="no such step"):
        Training().private_step.run(step, [])


def test_a_part_of_another_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="belong"):
        Training(plan=plan_for(dataclasses.replace(PART, name="other")))


def test_without_privacy_nothing_is_noised() -> None:
    part = dataclasses.replace(PART, noise_multiplier=0.0, clipping="none", sample_rate=1.0)
    plan = PrivacyPlan("none", NUM_UNITS, (part,))
    training = Training(part, plan)
    training.private_step._optimizer = torch.optim.SGD(training.parameters.values(), lr=1.0)
    reference = Training(part, plan)
    record_loss(reference.model, DATA).mean().backward()
    expected = reference.weights() - torch.cat([p.grad.flatten() for p in reference.parameters.values()])
    training.step(0, size=7)
    assert torch.allclose(training.weights(), expected, atol=1e-6)


def test_a_private_plan_without_noise_cannot_step() -> None:
    part = dataclasses.replace(PART, noise_multiplier=0.0)
    with pytest.raises(ValueError, match="noise"):
        plan_for(part)
    plan = plan_for(PART)
    with pytest.raises(ValueError, match="needs noise"):
        noise_std(plan, part)
