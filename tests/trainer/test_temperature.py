"""The temperature behind an `attentive_lora`: its gradient against float64, what it moves, resuming, what it mends."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from app.catalog.adaptations import AttentiveHead, AttentiveLora
from app.catalog.recipes import HEAD_PHASE, MAIN_PHASE, Phase
from tests.trainer.jobs import KEY, LABELS, TEMPERATURE, MadeJob, make_job, rows
from worker.trainer import loop
from worker.trainer.adaptations.temperature import Scale, ScaledLinear
from worker.trainer.control import Control
from worker.trainer.dp.engines import make_engine
from worker.trainer.features import Features
from worker.trainer.messages import Notice
from worker.trainer.run import prepare, run

FEW_STEPS = dataclasses.replace(TEMPERATURE, num_steps=4)


def _phases(*behind: Phase, head: int = 2, main: int = 3) -> tuple[Phase, ...]:
    return (
        Phase(HEAD_PHASE, AttentiveHead(1), 0.5, head, 0.05, 0.2, averaging=0.9, noise_ratio=1.6),
        Phase(MAIN_PHASE, AttentiveLora(1, rank=2, alpha=4.0), 0.5, main, 1e-2, 1e-2, averaging=0.9),
        *behind,
    )


def _weights(job: MadeJob, folder: str = "results") -> dict[str, Tensor]:
    return load_file(job.folder / folder / "model/model.safetensors")


@pytest.mark.parametrize("units", [[0, 1, 2, 3, 4, 5], [4, 7, 7, 4, 7, 3]], ids=["rows", "units"])
def test_the_clipped_sum_is_that_of_a_formula(units: list[int]) -> None:
    """Of a record Σ over classes of (p - y) · z; a unit's is the mean over its records, cut to ±C."""
    logits = 6.0 * torch.randn(6, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels, log = torch.tensor([0, 1, 2, 2, 1, 0]), -0.7

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch["features"]), batch["labels"], reduction="none")

    scale = Scale().double()
    nn.init.constant_(scale.log, log)
    batch = {"features": logits, "labels": labels}
    made = partial(make_engine, scale, ["log"], loss, clipping="flat")
    scaled = math.exp(log) * logits
    of_row = ((scaled.softmax(1) - F.one_hot(labels, 3)) * scaled).sum(1).tolist()
    owners = list(dict.fromkeys(units))
    means = [sum(g for g, u in zip(of_row, units, strict=True) if u == unit) / units.count(unit) for unit in owners]
    bound = sorted(map(abs, means))[len(means) // 2]
    engine = made(max_grad_norm=bound, example=batch)
    assert not engine.fallbacks
    values = engine.accumulate(batch, torch.tensor(units))
    assert values.squared_norms.sqrt().tolist() == pytest.approx([abs(mean) for mean in means], rel=1e-10)
    expected = sum(min(max(mean, -bound), bound) for mean in means)
    assert engine.take()["log"].item() == pytest.approx(expected, rel=1e-10)


def test_it_scales_the_logits_of_what_was_trained_before_and_nothing_else(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same job with it and without: equal but for one factor on the head, which its checkpoints have, too."""
    without = make_job(tmp_path / "without", base, phases=_phases(), evaluation="none")
    run(without.folder, KEY, Control(None))
    scales: list[float] = []
    held: list[Features] = []
    batches, merged = loop.micro_batches, ScaledLinear.merged

    def noted(*given: Any) -> Any:
        if given[1].phase.name == TEMPERATURE.name:
            held.append(given[3])
        return batches(*given)

    def merging(head: ScaledLinear) -> nn.Linear:
        scales.append(head.scale.log.exp().item())
        return merged(head)

    monkeypatch.setattr(loop, "micro_batches", noted)
    monkeypatch.setattr(ScaledLinear, "merged", merging)
    job = make_job(tmp_path / "job", base, phases=_phases(FEW_STEPS), evaluation="none")
    spec = dataclasses.replace(job.spec, published_steps=(6, 8))
    spec.write(job.folder)
    run(job.folder, KEY, Control(None))

    bare = _weights(without)
    inputs = {"input_ids": torch.tensor([[2, 5, 12, 3], [2, 9, 8, 3]]), "attention_mask": torch.ones(2, 4).long()}
    plain = AutoModelForSequenceClassification.from_pretrained(without.folder / "results/model")
    # Of the phases before: as averaged.
    assert scales[0] == 1.0
    taken = _weights(job, "taken/6/results")
    assert all(torch.equal(value, taken[name]) for name, value in bare.items())
    for folder, scale in zip(("taken/8/results", "results"), scales[1:], strict=True):
        assert scale != pytest.approx(1.0, abs=1e-3)
        weights = _weights(job, folder)
        assert weights.keys() == bare.keys()
        assert {name for name in bare if not torch.equal(bare[name], weights[name])} == {
            "classifier.weight",
            "classifier.bias",
        }
        model = AutoModelForSequenceClassification.from_pretrained(job.folder / folder / "model")
        with torch.inference_mode():
            assert torch.allclose(model(**inputs).logits, scale * plain(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert scales[1] != scales[2]
    # Computed once, of the averaged weights of the phases before: the logits of the model without.
    assert len(held) == FEW_STEPS.num_steps
    assert len({id(features) for features in held}) == 1
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        for (text, _), logits in zip(rows(), held[0].vectors, strict=True):
            assert torch.allclose(plain(**tokenizer(text, return_tensors="pt")).logits[0], logits, rtol=1e-4, atol=1e-5)


def test_a_plan_of_three_phases_counts_all_of_them(tmp_path: Path, base: Path) -> None:
    job = make_job(tmp_path / "job", base, phases=_phases(FEW_STEPS))
    parts = {part.name: part for part in job.spec.plan.parts}
    assert list(parts) == ["centring", "head", "main", "temperature", "evaluation"]
    temperature = parts["temperature"]
    assert (temperature.clipping, temperature.max_grad_norm, temperature.loss) == ("flat", 4.0, None)
    assert temperature.noise_multiplier == TEMPERATURE.noise_ratio * parts["main"].noise_multiplier
    run(job.folder, KEY, Control(None))
    curve = job.metrics()["train_loss_curve"]
    assert {point["phase"] for point in curve} == {"head", "main"}


@pytest.mark.parametrize("steps", [5, 6, 8], ids=["before the pass over the rows", "after one step", "after three"])
def test_a_job_that_was_stopped_in_it_ends_as_one_that_was_not(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    whole, cut = (make_job(tmp_path / name, base, phases=_phases(FEW_STEPS)) for name in ("whole", "cut"))
    run(whole.folder, KEY, Control(None))
    control, computed, batches = Control(None), loop.logits, loop.micro_batches
    made: list[int] = []

    def stopping(*given: Any) -> Any:
        made.append(given[-1])
        if len(made) == steps:
            control._stop.set()
        return batches(*given)

    def stopping_before(*given: Any) -> Any:
        control._stop.set()
        return computed(*given)

    with monkeypatch.context() as patched:
        if steps == 5:
            patched.setattr(loop, "logits", stopping_before)
        else:
            patched.setattr(loop, "micro_batches", stopping)
        run(cut.folder, KEY, control)
    assert not (cut.folder / "results/model").exists()
    newest = max((cut.folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    assert newest.name == str(1 + steps)  # the centring, too
    newest.rename(cut.folder / "resume")  # as the supervisor does
    told: list[Any] = []
    control = Control(None)
    control.send = told.append  # type: ignore[method-assign]
    run(cut.folder, KEY, control)
    assert [message.code for message in told if isinstance(message, Notice)] == ["computing_features"]
    one, other = _weights(whole), _weights(cut)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert whole.metrics() == cut.metrics()


def test_it_mends_what_automatic_clipping_makes_too_sure_of_itself(tmp_path: Path, base: Path) -> None:
    """A fifth of the labels is wrong, so that nobody can be surer than that."""

    def noisy(count: int, start: int) -> list[tuple[str, str]]:
        flipped = {label: LABELS[1 - place] for place, label in enumerate(LABELS)}
        data = rows(start + count)[start:]
        drawn = torch.rand(count, generator=torch.Generator().manual_seed(start)) < 0.2
        return [(text, flipped[label] if wrong else label) for (text, label), wrong in zip(data, drawn, strict=True)]

    data, validation = noisy(600, 0), noisy(400, 1001)
    metrics = []
    for name, behind in (("without", ()), ("with", (TEMPERATURE,))):
        made: dict[str, Any] = {"data": data, "validation": validation, "evaluation": "public", "tokens": 4096}
        job = make_job(tmp_path / name, base, phases=_phases(*behind, head=60, main=30), noise=0.7, **made)
        run(job.folder, KEY, Control(None))
        metrics.append(job.metrics())
    before, after = metrics
    assert before["accuracy"] == after["accuracy"] > 0.7
    assert before["loss"] > math.log(2)  # worse than a coin
    assert after["loss"] < 0.56  # the best there is: 0.50


def test_no_phase_before_it_trains_the_scale(tmp_path: Path, base: Path) -> None:
    job = make_job(tmp_path / "job", base, phases=_phases(FEW_STEPS))
    prepared = prepare(job.folder, KEY, Control(None))
    head, main, temperature = (phase.parameters for phase in prepared.phases)
    assert list(temperature) == ["classifier.scale.log"]
    assert not temperature.keys() & (head.keys() | main.keys())
    assert {"classifier.weight", "classifier.bias"} <= head.keys() & main.keys()
    assert not any(engine.fallbacks for engine in prepared.engines)
