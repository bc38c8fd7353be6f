"""Killed with -9 and resumed from the last checkpoint, a job ends with the weights of one that was never killed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.catalog.recipes import MAIN_PHASE, Phase
from tests.trainer.encoders import MASKED, make_encoder_base
from tests.trainer.jobs import ADAPTATIONS, KEY, MadeJob, make_job, phases_for
from worker.trainer.control import Control
from worker.trainer.failure import TrainerFailure
from worker.trainer.run import run

STEPS = 3

Attempt = Callable[[MadeJob, int | None], int]


@pytest.fixture(scope="module")
def attempt() -> Iterator[Attempt]:
    """Runs a job in a child process, killed after so many steps of this attempt; the exit status."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.trainer.killer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(job: MadeJob, kill_after: int | None) -> int:
        order = {"folder": str(job.folder), "key": KEY.hex(), "kill_after": kill_after}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.stdout.close()
    assert process.wait() == 0


def _newest(job: MadeJob) -> Path | None:
    found = [path for path in (job.folder / "checkpoints").glob("*") if path.name.isdigit()]
    return max(found, key=lambda path: int(path.name), default=None)


def _take_over(job: MadeJob) -> None:
    """What the supervisor does: the newest complete checkpoint becomes the resume point, the rest goes."""
    newest = _newest(job)
    if newest is not None:
        shutil.rmtree(job.folder / "resume", ignore_errors=True)
        newest.rename(job.folder / "resume")
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)


def _weights(job: MadeJob) -> dict[str, torch.Tensor]:
    return load_file(job.folder / "results/model/model.safetensors")


@pytest.fixture(scope="module")
def unbroken(attempt: Attempt, base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, MadeJob]:
    made = {}
    for adaptation in ("head", "lora"):
        job = make_job(tmp_path_factory.mktemp("whole") / "job", base, adaptation=adaptation, steps=STEPS)
        assert attempt(job, None) == 0
        made[adaptation] = job
    return made


# A warm head of three steps, then LoRA of three: inside either, and at the boundary.
@pytest.mark.parametrize("kills", [(1,), (2,), (3,), (4,), (5,), (1, 1, 2), (0,)], ids=str)
def test_weights_are_bit_identical_after_kills(
    tmp_path: Path, base: Path, attempt: Attempt, unbroken: dict[str, MadeJob], kills: tuple[int, ...]
) -> None:
    job = make_job(tmp_path / "job", base, adaptation="lora", steps=STEPS, checkpoint_seconds=0)
    done = 0
    for kill in kills:
        assert attempt(job, kill) == -9
        done += kill
        _take_over(job)
        if done:
            state = json.loads((job.folder / "resume/state.json").read_text())
            assert sum(state["executed"].values()) == done + 1  # the centring is a step, too
    assert attempt(job, None) == 0
    expected, got = _weights(unbroken["lora"]), _weights(job)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert job.metrics() == unbroken["lora"].metrics()


def test_what_a_step_hides_is_hidden_again_after_a_kill(tmp_path: Path, attempt: Attempt) -> None:
    base = make_encoder_base(tmp_path / "base", "masked", "bert")
    phases = (Phase(MAIN_PHASE, ADAPTATIONS["lora"], 0.5, 4, 1e-2, 1e-2),)
    task = dataclasses.replace(MASKED, columns={"text": "review"})
    whole, killed = (
        make_job(tmp_path / name, base, task=task, phases=phases, checkpoint_seconds=0) for name in ("whole", "killed")
    )
    assert attempt(whole, None) == 0
    assert attempt(killed, 2) == -9
    _take_over(killed)
    assert attempt(killed, None) == 0
    expected, got = _weights(whole), _weights(killed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_what_adapts_and_what_was_released_go_on_after_a_kill(tmp_path: Path, base: Path, attempt: Attempt) -> None:
    """Norm bound, losses, corrected moments, learning rates and momentum: all as if never killed."""
    head, main = phases_for("bitfit", 4)
    phases = (
        dataclasses.replace(head, optimizer="sgd", schedule="linear"),
        dataclasses.replace(main, optimizer="dp_adam_bc", schedule="cosine", num_warmup_steps=2),
    )
    made = {"adaptation": "bitfit", "phases": phases, "clipping": "adaptive", "checkpoint_seconds": 0}
    whole, killed = (make_job(tmp_path / name, base, **made) for name in ("whole", "killed"))
    assert attempt(whole, None) == 0
    for kill in (2, 3):  # inside the first phase, and in the second
        assert attempt(killed, kill) == -9
        _take_over(killed)
    state = json.loads((killed.folder / "resume/state.json").read_text())
    assert state["max_grad_norm"].keys() == {"head", "main"}
    assert 1.0 not in state["max_grad_norm"].values()
    assert attempt(killed, None) == 0
    expected, got = _weights(whole), _weights(killed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert killed.metrics() == whole.metrics()
    curve = whole.metrics()["train_loss_curve"]
    assert [(point["phase"], point["step"]) for point in curve] == [
        *(("head", step) for step in range(2, 6)),
        *(("main", step) for step in range(6, 10)),
    ]


@pytest.mark.parametrize("missing", ["losses", "max_grad_norm"])
def test_a_checkpoint_without_what_its_steps_released_is_refused(tmp_path: Path, base: Path, missing: str) -> None:
    job = make_job(tmp_path / "job", base, clipping="adaptive")
    run(job.folder, KEY, Control(None))
    _take_over(job)
    resume = job.folder / "resume"
    if missing == "losses":
        tensors = load_file(resume / "state.safetensors")
        tensors["losses/head"] = tensors["losses/head"][:-1]
        save_file(tensors, resume / "state.safetensors")
    else:
        state = json.loads((resume / "state.json").read_text())
        (resume / "state.json").write_text(json.dumps({**state, "max_grad_norm": {}}))
    with pytest.raises(TrainerFailure) as caught:
        run(job.folder, KEY, Control(None))
    assert caught.value.code == "resume_mismatch"


def test_a_kill_without_a_checkpoint_starts_from_the_start(
    tmp_path: Path, base: Path, attempt: Attempt, unbroken: dict[str, MadeJob]
) -> None:
    job = make_job(tmp_path / "job", base, steps=STEPS)
    assert attempt(job, 2) == -9
    assert _newest(job) is None
    assert attempt(job, None) == 0
    expected, got = _weights(unbroken["head"]), _weights(job)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_end_of_the_last_step_is_a_checkpoint_that_executes_no_step_again(
    tmp_path: Path, base: Path, attempt: Attempt, unbroken: dict[str, MadeJob]
) -> None:
    job = make_job(tmp_path / "job", base, steps=STEPS)
    assert attempt(job, None) == 0
    _take_over(job)
    shutil.rmtree(job.folder / "results")
    (job.folder / "results").mkdir()
    assert attempt(job, 0) == 0  # killed before its first step, had it one
    expected, got = _weights(unbroken["head"]), _weights(job)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_checkpoint_holds_nothing_but_what_was_released(tmp_path: Path, base: Path) -> None:
    job = make_job(tmp_path / "job", base, adaptation="bitfit")
    run(job.folder, KEY, Control(None))
    newest = _newest(job)
    assert newest is not None
    assert {path.name for path in newest.iterdir()} == {"state.json", "state.safetensors"}
    state = json.loads((newest / "state.json").read_text())
    assert state.keys() == {
        "version", "job_id", "plan_digest", "dataset_digest", "base", "executed", "phase", "average_count",
        "max_grad_norm",
    }  # fmt: skip
    tensors = load_file(newest / "state.safetensors")
    assert {name.partition("/")[0] for name in tensors} == {"weights", "optimizer", "centre", "losses"}
    assert KEY not in (newest / "state.safetensors").read_bytes()


@pytest.mark.parametrize("broken", ["plan", "data", "job", "torn", "steps", "parameters"])
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, base: Path, broken: str) -> None:
    job = make_job(tmp_path / "job", base)
    run(job.folder, KEY, Control(None))
    _take_over(job)
    spec, resume = job.spec, job.folder / "resume"
    if broken == "plan":
        spec = dataclasses.replace(spec, plan=dataclasses.replace(spec.plan, target_delta=1e-6))
    elif broken == "data":
        spec = dataclasses.replace(spec, dataset_digest="1" * 64)
    elif broken == "job":
        spec = dataclasses.replace(spec, job_id="ftjob-other")
    elif broken == "torn":
        content = (resume / "state.safetensors").read_bytes()
        (resume / "state.safetensors").write_bytes(content[: len(content) // 2])
    elif broken == "steps":
        state = json.loads((resume / "state.json").read_text())
        state["executed"]["head"] += 1
        (resume / "state.json").write_text(json.dumps(state))
    else:
        other = make_job(tmp_path / "other", base, adaptation="bitfit")
        run(other.folder, KEY, Control(None))
        shutil.copy(_newest(other) / "state.safetensors", resume / "state.safetensors")
    spec.write(job.folder)
    with pytest.raises(TrainerFailure) as caught:
        run(job.folder, KEY, Control(None))
    assert caught.value.code == "resume_mismatch"


def test_a_lonely_trainer_keeps_two_checkpoints(tmp_path: Path, base: Path) -> None:
    job = make_job(tmp_path / "job", base, checkpoint_seconds=0, steps=5)
    run(job.folder, KEY, Control(None))
    assert sorted(path.name for path in (job.folder / "checkpoints").iterdir()) == ["5", "6"]
