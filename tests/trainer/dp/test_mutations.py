"""The tests' own test: engines broken in well-known ways, each caught by a check that ours passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.privacy.plan import PrivacyPlan, SampledGaussian
from tests.trainer.dp.cases import CASES, Batch, build, to_dtype, trainable
from tests.trainer.dp.checks import (
    RIDING,
    check_loop,
    check_noise,
    check_riders,
    check_scalar_noise,
    check_sensitivity,
    with_scale,
)
from tests.trainer.dp.oracles import norm
from worker.trainer.dp import outer
from worker.trainer.dp import step as step_module
from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.dp.engine import UnitValues, zero_sums
from worker.trainer.dp.engines import make_engine
from worker.trainer.dp.randomness import JobRandomness
from worker.trainer.dp.step import PrivateStep
from worker.trainer.dp.tape import Tape

RANDOMNESS = JobRandomness(bytes(range(32)))
OWN_UNIT = torch.arange(6)
SEVERAL_ROWS = torch.tensor([40, 7, 7, 40, 7, 3])


def _sensitivity(make: Callable, loss: Callable | None = None, name: str = "bert") -> None:
    model = build(name, dtype=torch.float32)
    batch = CASES[name].batch(6)
    batch["scale"] = torch.tensor([1.0, 1e3, 1e-4, 1.0, 30.0, 1.0])
    check_sensitivity(make, model, trainable(model), with_scale(loss or CASES[name].loss), batch, OWN_UNIT, "flat")


def _loop(name: str, unit_index: Tensor = OWN_UNIT, make: Callable = BookKeepingEngine) -> None:
    model = build(name)
    batch = to_dtype(CASES[name].batch(6), torch.float64)
    check_loop(make, model, trainable(model), CASES[name].loss, batch, unit_index, CASES[name].tolerance)


class _ClipsAfterSum(BookKeepingEngine):
    """Sums first, then clips the sum to C times the number of units: the total looks bounded, no unit is."""

    def accumulate(self, batch: Batch, unit_index: Tensor) -> UnitValues:
        tape, losses = self.record(batch, unit_index)
        squared = sum(tape.squared_norms().values())
        self._sums = self._sums or zero_sums(self._parameters)
        factors = dict.fromkeys(self._parameters, torch.ones_like(squared))
        tape.add_clipped_sums(factors, self._sums)
        scale = min(1.0, self.max_grad_norm * len(squared) / norm(self._sums))
        for value in self._sums.values():
            value.mul_(scale)
        return UnitValues(squared, losses)


def test_clip_after_sum_is_caught() -> None:
    _sensitivity(BookKeepingEngine)
    with pytest.raises(AssertionError):
        _sensitivity(_ClipsAfterSum)
    with pytest.raises(AssertionError):
        _loop("bert", make=_ClipsAfterSum)


def test_noise_of_a_quarter_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    add_noise = JobRandomness.add_noise_
    monkeypatch.setattr(
        JobRandomness, "add_noise_", lambda self, tensor, std, **names: add_noise(self, tensor, std / 4, **names)
    )
    with pytest.raises(AssertionError):
        check_noise(RANDOMNESS)


@pytest.mark.parametrize("forgotten", ["step", "name", "phase and step"])
def test_a_reused_stream_is_caught(monkeypatch: pytest.MonkeyPatch, forgotten: str) -> None:
    subkey = JobRandomness.subkey

    def forgetful(self: JobRandomness, phase: str, step: int, stream: str, name: str = "") -> bytes:
        return subkey(self, phase, 0 if "step" in forgotten else step, stream, "" if forgotten == "name" else name)

    monkeypatch.setattr(JobRandomness, "subkey", forgetful)
    with pytest.raises(AssertionError):
        check_noise(RANDOMNESS)


@pytest.mark.parametrize("name", ["gpt2", "qwen3_tied", "t5", "bart"])
def test_a_dropped_cross_term_of_tied_weights_is_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _loop(name)
    monkeypatch.setattr(outer, "instantiates", lambda left, right, units: False)
    _loop(name)  # ghost norms everywhere, still exact
    cross = outer.cross_gather
    monkeypatch.setattr(outer, "cross_gather", lambda *arguments: torch.zeros_like(cross(*arguments)))
    with pytest.raises(AssertionError):
        _loop(name)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_dropped_cross_terms_between_rows_are_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(outer, "instantiates", lambda left, right, units: False)
    monkeypatch.setattr(outer, "row_pairs", lambda units: (OWN_UNIT[:0], OWN_UNIT[:0]))
    _loop(name)  # one row each: there are none
    with pytest.raises(AssertionError):
        _loop(name, SEVERAL_ROWS)


def test_overwritten_uses_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of one use of a tied weight replaces the other's."""
    add_gather = Tape.add_gather

    def overwrite(self: Tape, name: str, ids: Tensor, gradients: Tensor) -> None:
        self._uses[name].outers.clear()
        add_gather(self, name, ids, gradients)

    monkeypatch.setattr(Tape, "add_gather", overwrite)
    with pytest.raises(AssertionError):
        _loop("gpt2")


def _mean_over_batch(model: nn.Module, batch: Batch) -> Tensor:
    """Divides by the tokens of the whole batch, as usual in language modelling: a long record weighs on the others."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    mask = batch["attention_mask"][:, 1:].to(logits.dtype)
    losses = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    return len(mask) * (losses * mask).sum(1) / mask.sum()


def test_a_mean_over_the_batch_is_caught() -> None:
    """Leaving out the long record moves all others. Shapes cannot tell; the dry step does, and takes rows singly."""
    model = build("llama", dtype=torch.float32)
    batch = CASES["llama"].batch(6)
    batch["attention_mask"] = torch.tensor([[1] * 7] + [[1, 1, 0, 0, 0, 0, 0]] * 5)
    batch["input_ids"][1:, :2] = torch.tensor([3, 5])  # alike, so that what moves adds up
    batch["scale"] = torch.tensor([1e3] + [0.05] * 5)
    arguments = (model, trainable(model), with_scale(_mean_over_batch), batch, OWN_UNIT)
    with pytest.raises(AssertionError):
        check_sensitivity(BookKeepingEngine, *arguments, "flat")
    check_sensitivity(make_engine, *arguments, "flat")
    with pytest.raises(AssertionError):
        check_loop(BookKeepingEngine, *arguments, 1e-4)
    check_loop(make_engine, *arguments, 1e-4)


def test_noise_in_half_precision_is_caught() -> None:
    """Only a few thousand distinct values: what a bfloat16 noise would look like to the law's test."""

    class Halved(JobRandomness):
        def add_noise_(self, tensor: Tensor, std: float, **names: object) -> None:
            super().add_noise_(tensor, std, **names)
            tensor.copy_(tensor.to(torch.bfloat16))

    with pytest.raises(AssertionError):
        check_noise(Halved(bytes(range(32))))


LOSS_ONLY = dataclasses.replace(RIDING, clipping="flat", quantile=None)


def test_a_loss_that_is_not_clipped_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    check_riders(LOSS_ONLY)
    monkeypatch.setattr(
        step_module, "centred_losses", lambda losses, rider: losses.to(torch.float64) - rider.bound / 2.0
    )
    with pytest.raises(AssertionError):
        check_riders(LOSS_ONLY)


@pytest.mark.parametrize("coordinate", ["gradient", "loss", "quantile"])
def test_a_standard_deviation_without_its_share_is_caught(monkeypatch: pytest.MonkeyPatch, coordinate: str) -> None:
    """The whole noise multiplier for one coordinate, as if it were released alone."""
    check_riders(RIDING)
    noise_std = step_module.noise_std

    def forgetful(plan: PrivacyPlan, part: SampledGaussian, name: str = "gradient", **options: object) -> float:
        share = part.noise_multipliers[name] / part.noise_multiplier
        return noise_std(plan, part, name, **options) / (share if name == coordinate else 1.0)

    monkeypatch.setattr(step_module, "noise_std", forgetful)
    with pytest.raises(AssertionError):
        check_riders(RIDING)
    if coordinate != "gradient":  # whose share is nearly all: the law alone cannot tell
        with pytest.raises(AssertionError):
            check_scalar_noise(dataclasses.replace(RIDING, sample_rate=1.0))


def test_a_count_that_is_not_centred_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    centred = step_module.centred_count
    monkeypatch.setattr(step_module, "centred_count", lambda squared, bound: centred(squared, bound) + 0.5)
    with pytest.raises(AssertionError):
        check_riders(RIDING)


def test_the_drawn_batch_as_a_divisor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    run = PrivateStep.run

    def divides_by_what_was_drawn(self: PrivateStep, step: int, batches: Iterable[tuple[Batch, Tensor]]) -> object:
        drawn = list(batches)
        self._divisor = max(1, sum(len(units) for _, units in drawn))
        return run(self, step, drawn)

    monkeypatch.setattr(PrivateStep, "run", divides_by_what_was_drawn)
    with pytest.raises(AssertionError):
        check_riders(RIDING)


def test_noise_that_does_not_follow_the_bound_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    noise_std = step_module.noise_std
    monkeypatch.setattr(
        step_module, "noise_std", lambda *arguments, max_grad_norm=None, **options: noise_std(*arguments, **options)
    )
    with pytest.raises(AssertionError):
        check_riders(RIDING)


def test_a_stream_shared_by_losses_and_counts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count's noise is the loss's, over again."""
    monkeypatch.setattr(step_module, "CLIP", step_module.LOSS)
    with pytest.raises(AssertionError):
        check_scalar_noise(dataclasses.replace(RIDING, sample_rate=1.0))
