"""The trainer's story on a tiny encoder, in process: what comes out of a job folder, for every adaptation."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from app.privacy.plan import GaussianRelease
from tests.trainer.jobs import ADAPTATIONS, KEY, LABELS, NUM_HELD_OUT, make_job, rows
from worker.trainer import loop
from worker.trainer import run as run_module
from worker.trainer.control import Control
from worker.trainer.dp.engine import EngineError
from worker.trainer.dp.layers import HANDLERS
from worker.trainer.failure import TrainerFailure
from worker.trainer.run import attempt, run

BUNDLE = {"README.md", "config.json", "metrics.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("private", [True, False], ids=["private", "plain"])
@pytest.mark.parametrize("adaptation", list(ADAPTATIONS))
def test_every_adaptation_gives_a_bundle_that_plain_transformers_loads(
    tmp_path: Path, base: Path, adaptation: str, private: bool
) -> None:
    job = make_job(
        tmp_path / "job", base, adaptation=adaptation, private=private, evaluation="private" if private else "public"
    )
    run(job.folder, KEY, Control(None))
    bundle = job.folder / "results/model"
    assert {path.name for path in bundle.iterdir()} == BUNDLE
    classify = pipeline("text-classification", model=str(bundle), device="cpu")
    answer = classify("the film was great")[0]
    assert answer["label"] in LABELS
    assert 0.0 <= answer["score"] <= 1.0
    weights = load_file(bundle / "model.safetensors")
    assert not [name for name in weights if "lora" in name or "base_layer" in name]
    changed = _changed(weights, base)
    dense = "bert.encoder.layer.0.output.dense"
    query, embeddings = "encoder.layer.1.attention.self.query.weight", "embeddings.word_embeddings.weight"
    assert ("bert." + query in changed) == (adaptation in ("lora", "last_layers", "full"))
    assert ("bert.encoder.layer.0.attention.self.query.weight" in changed) == (adaptation in ("lora", "freeze", "full"))
    assert (f"{dense}.weight" in changed) == (adaptation == "full")
    assert ("bert." + embeddings in changed) == (adaptation == "full")
    assert (f"{dense}.bias" in changed) == (adaptation in ("bitfit", "full"))
    assert weights["classifier.weight"].abs().min() > 0
    assert job.metrics()["released"] == ("private" if private else "public")


def _changed(weights: dict[str, torch.Tensor], base: Path) -> set[str]:
    before = {f"bert.{name}": value for name, value in load_file(base / "model.safetensors").items()}
    return {name for name, value in before.items() if name in weights and not torch.equal(value, weights[name])}


def test_without_noise_it_learns_the_task(tmp_path: Path, base: Path) -> None:
    data = rows(200)
    job = make_job(tmp_path / "job", base, private=False, evaluation="public", steps=80, data=data)
    run(job.folder, KEY, Control(None))
    assert job.metrics()["accuracy"] >= 0.9  # half of the rows have either class


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "adaptive"])
@pytest.mark.parametrize(("adaptation", "units"), [("head", False), ("lora", True)])
def test_every_clipping_trains_and_tells_its_losses(
    tmp_path: Path, base: Path, clipping: Any, adaptation: str, units: bool
) -> None:
    data = rows()
    patients = [f"p{index // 2:02}" for index in range(len(data))] if units else None
    job = make_job(
        tmp_path / "job", base, adaptation=adaptation, clipping=clipping, units=patients, num_held_out=6, data=data
    )
    run(job.folder, KEY, Control(None))
    curve = job.metrics()["train_loss_curve"]
    assert [point["phase"] for point in curve][-4:] == [job.spec.phases[-1].name] * 4
    assert all(0.0 <= point["train_loss"] <= 2.0 for point in curve)


def test_without_noise_the_curve_is_the_loss(tmp_path: Path, base: Path) -> None:
    data = rows(120)
    job = make_job(tmp_path / "job", base, private=False, evaluation="public", steps=80, data=data)
    run(job.folder, KEY, Control(None))
    losses = [point["train_loss"] for point in job.metrics()["train_loss_curve"]]
    assert {point["train_loss_noise_std"] for point in job.metrics()["train_loss_curve"]} == {0.0}
    assert losses[0] > 0.5 > 0.35 > losses[-1]  # from about ln 2


def test_without_a_curve_nothing_of_the_losses_is_told(tmp_path: Path, base: Path) -> None:
    job = make_job(tmp_path / "job", base, loss_bound=None)
    run(job.folder, KEY, Control(None))
    assert "train_loss_curve" not in job.metrics()


def test_roberta_trains_and_loads(tmp_path: Path, roberta_base: Path) -> None:
    job = make_job(tmp_path / "job", roberta_base, adaptation="lora", family="roberta")
    run(job.folder, KEY, Control(None))
    model = AutoModelForSequenceClassification.from_pretrained(job.folder / "results/model")
    assert type(model).__name__ == "RobertaForSequenceClassification"


def test_the_exported_head_is_the_average_of_the_steps_weights(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    class Noting(loop.PrivateStep):
        def run(self, step: int, micro_batches: Any) -> Any:
            released = super().run(step, micro_batches)
            seen.append(self._parameters["weight"].detach().cpu().clone())
            return released

    monkeypatch.setattr(loop, "PrivateStep", Noting)
    job = make_job(tmp_path / "job", base, steps=6)
    run(job.folder, KEY, Control(None))
    decays = [0.9 ** (5 - step) for step in range(6)]
    expected = sum(decay * weight for decay, weight in zip(decays, seen, strict=True)) / sum(decays)
    exported = load_file(job.folder / "results/model/model.safetensors")["classifier.weight"]
    torch.testing.assert_close(exported, expected)
    assert not torch.allclose(exported, seen[-1])


def test_the_same_key_gives_the_same_model_and_another_key_another_one(tmp_path: Path, base: Path) -> None:
    weights = []
    for index, key in enumerate((KEY, KEY, bytes(32))):
        job = make_job(tmp_path / str(index), base)
        run(job.folder, key, Control(None))
        weights.append(load_file(job.folder / "results/model/model.safetensors")["classifier.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_memory_limits_do_not_change_the_model(tmp_path: Path, base: Path) -> None:
    weights = []
    for index, tokens in enumerate((16, 4096)):
        job = make_job(tmp_path / str(index), base, adaptation="bitfit", tokens=tokens)
        run(job.folder, KEY, Control(None))
        weights.append(load_file(job.folder / "results/model/model.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_close_to_float32(tmp_path: Path, base: Path, precision: str) -> None:
    weights = []
    for name in ("float32", precision):
        job = make_job(tmp_path / name, base, adaptation="last_layers", steps=2)
        spec = dataclasses.replace(job.spec, runtime=dataclasses.replace(job.spec.runtime, precision=name))
        spec.write(job.folder)
        run(job.folder, KEY, Control(None))
        weights.append(load_file(job.folder / "results/model/model.safetensors"))
    moved = 0.0
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0.1, atol=0.05)
        moved = max(moved, float((weights[1][name] - value).abs().max()))
    assert moved > 0


def test_the_card_states_the_guarantee_and_no_path(tmp_path: Path, base: Path) -> None:
    job = make_job(tmp_path / "job", base)
    run(job.folder, KEY, Control(None))
    bundle = job.folder / "results/model"
    card = (bundle / "README.md").read_text()
    assert card.startswith('---\nlicense: "other"\nbase_model: "tiny"\n')
    assert "δ = 1e-05" in card
    assert "| head | 0.5 | 4 | 1 | 1, automatic clipping |" in card
    assert "weights and the metrics below" in card
    for path in bundle.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    config = json.loads((bundle / "config.json").read_text())
    assert config["label2id"] == {"negative": 0, "positive": 1}
    assert AutoTokenizer.from_pretrained(bundle).model_max_length == 16


def test_metrics_say_why_there_are_none(tmp_path: Path, base: Path) -> None:
    job = make_job(tmp_path / "job", base, evaluation="none")
    run(job.folder, KEY, Control(None))
    assert job.metrics()["released"] == "none"
    assert "accuracy" not in job.metrics()


def test_a_validation_file_is_evaluated_instead_of_a_split(tmp_path: Path, base: Path) -> None:
    job = make_job(tmp_path / "job", base, validation=rows(30))
    run(job.folder, KEY, Control(None))
    assert (job.metrics()["dataset"], job.metrics()["num_units"]) == ("validation_file", 30)
    job = make_job(tmp_path / "split", base)
    run(job.folder, KEY, Control(None))
    assert (job.metrics()["dataset"], job.metrics()["num_units"]) == ("held_out_split", NUM_HELD_OUT)


@pytest.mark.parametrize("broken", ["fewer_rows", "unknown_label", "missing_text", "missing_column", "no_file"])
def test_rows_other_than_planned_are_refused(tmp_path: Path, base: Path, broken: str) -> None:
    data = rows()
    if broken == "unknown_label":
        data[3] = ("the film", "neutral")
    if broken == "missing_text":
        data[3] = (None, LABELS[0])  # type: ignore[assignment]
    job = make_job(tmp_path / "job", base, data=data)
    spec = job.spec
    if broken == "fewer_rows":
        fewer = make_job(tmp_path / "fewer", base, data=rows()[:-1])
        shutil.copy(fewer.folder / "data/training.parquet", job.folder / "data/training.parquet")
    elif broken == "missing_column":
        spec = dataclasses.replace(spec, task=dataclasses.replace(spec.task, columns={"text": "x", "label": "mood"}))
    elif broken == "no_file":
        (job.folder / "data/training.parquet").unlink()
    spec.write(job.folder)
    with pytest.raises(TrainerFailure) as caught:
        run(job.folder, KEY, Control(None))
    assert caught.value.code == "data_mismatch"
    assert not list((job.folder / "results").iterdir())


def test_a_plan_for_other_phases_is_refused(tmp_path: Path, base: Path) -> None:
    spec = make_job(tmp_path / "job", base, adaptation="lora").spec
    plan, phase = spec.plan, spec.phases[0]
    reversed_parts = dataclasses.replace(plan, parts=plan.parts[::-1])
    weak = dataclasses.replace(plan, parts=(GaussianRelease("centring", 1.0, 0.1), *plan.parts[1:]))
    other = {
        "steps": dataclasses.replace(spec, phases=(dataclasses.replace(phase, num_steps=5), *spec.phases[1:])),
        "rate": dataclasses.replace(spec, phases=(dataclasses.replace(phase, sample_rate=0.6), *spec.phases[1:])),
        "order": dataclasses.replace(spec, plan=reversed_parts),
        "no evaluation in the plan": dataclasses.replace(spec, plan=dataclasses.replace(plan, parts=plan.parts[:-1])),
        "unasked evaluation": dataclasses.replace(spec, evaluation="none"),
        "sensitivity": dataclasses.replace(spec, plan=weak),
        "nothing to evaluate on": dataclasses.replace(spec, data=dataclasses.replace(spec.data, num_held_out=0)),
    }
    for name, changed in other.items():
        changed.write(tmp_path / "job")
        with pytest.raises(TrainerFailure) as caught:
            run(tmp_path / "job", KEY, Control(None))
        assert caught.value.code == "plan_mismatch", name


def test_another_base_is_refused(tmp_path: Path, base: Path, roberta_base: Path) -> None:
    for name, path, family in (("type", roberta_base, "bert"), ("empty", tmp_path, "bert"), ("family", base, "gpt2")):
        job = make_job(tmp_path / name / "job", path, family=family)
        with pytest.raises(TrainerFailure) as caught:
            run(job.folder, KEY, Control(None))
        assert caught.value.code == "base_model_invalid", name


def test_a_base_with_a_missing_layer_is_refused(tmp_path: Path, base: Path) -> None:
    broken = tmp_path / "base"
    shutil.copytree(base, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    job = make_job(tmp_path / "job", broken)
    with pytest.raises(TrainerFailure) as caught:
        run(job.folder, KEY, Control(None))
    assert caught.value.code == "base_model_invalid"


def test_no_step_is_made_without_norms(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise EngineError("unsupported_use", "no norm")

    monkeypatch.setattr("worker.trainer.loop.make_engine", refuse)
    job = make_job(tmp_path / "job", base)
    with pytest.raises(TrainerFailure) as caught:
        run(job.folder, KEY, Control(None))
    assert caught.value.code == "missing_gradient_norm"


def test_layers_without_a_fast_way_are_told(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Listening(Control):
        def send(self, message: object) -> None:
            sent.append(message)

    without = {function: handler for function, handler in HANDLERS.items() if function is not F.layer_norm}
    monkeypatch.setattr("worker.trainer.dp.book_keeping.HANDLERS", without)
    job = make_job(tmp_path / "job", base, adaptation="last_layers", steps=1)
    run(job.folder, KEY, Listening(None))
    notices = [(message.code, message.data) for message in sent if message.type == "notice"]
    assert ("slow_gradients", {"phase": "main", "parameters": 1}) in notices
    assert (job.folder / "results/model/model.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "out_of_memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
            "out_of_memory",
        ),
        (ZeroDivisionError("a row said SECRET"), "trainer_error"),
    ],
)
def test_failures_leave_as_fixed_codes(
    tmp_path: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: Exception,
    code: str,
) -> None:
    sent = []

    class Listening(Control):
        def send(self, message: object) -> None:
            sent.append(message)

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(run_module, "train", fail)
    job = make_job(tmp_path / "job", base)
    assert attempt(job.folder, KEY, Listening(None)) is False
    assert [message.code for message in sent if message.type == "failed"] == [code]
    assert "SECRET" not in repr(sent)
    assert type(error).__name__ in capfd.readouterr().err
