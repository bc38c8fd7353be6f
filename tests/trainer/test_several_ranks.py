"""I end to end: `python -m worker.trainer` with two gloo ranks, and torchrun, against one process; stops, kills."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.jobs import KEY, NUM_ROWS, TEMPERATURE, MadeJob, make_job, phases_for
from tests.trainer.test_control import Supervisor
from worker.trainer import ranks as ranks_module
from worker.trainer.control import Control
from worker.trainer.dp.randomness import JobRandomness
from worker.trainer.dp.sampler import poisson_batch
from worker.trainer.landlock import Reach
from worker.trainer.messages import Allowed, Failed, Finished, Message, Notice, Rows, Stopped, encode
from worker.trainer.ranks import Order, Ranks, receive
from worker.trainer.run import run
from worker.trainer_process import TrainerGone, TrainerProcess

STEPS = 20
TRAINER = ("-m", "worker.trainer")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", *TRAINER)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, as of a socket."""
    with tempfile.TemporaryDirectory(prefix="pt-") as made:
        yield Path(made) / "j"


def _make(folder: Path, base: Path, ranks: int = 2) -> MadeJob:
    """Batches of two units on average: some steps have one or none. Whole units of several rows each."""
    phases = (*phases_for("lora", STEPS), dataclasses.replace(TEMPERATURE, num_steps=3))
    made: dict[str, Any] = {"tokens": 48, "checkpoint_seconds": 0, "units": _units(), "num_held_out": 6}
    job = make_job(folder, base, phases=phases, **made)
    phases = tuple(dataclasses.replace(phase, sample_rate=RATE) for phase in job.spec.phases)
    parts = tuple(
        dataclasses.replace(part, sample_rate=RATE) if hasattr(part, "sample_rate") else part
        for part in job.spec.plan.parts
    )
    runtime = dataclasses.replace(job.spec.runtime, ranks=ranks)
    plan = dataclasses.replace(job.spec.plan, parts=parts)
    spec = dataclasses.replace(job.spec, phases=phases, plan=plan, runtime=runtime)
    spec.write(folder)
    return MadeJob(folder, spec)


RATE = 0.1


def _units() -> list[str]:
    """Twenty-four people with one to four rows each."""
    owners = [index for index in range(30) for _ in range(1 + index % 4)]
    return [f"p{owners[row]}" for row in range(NUM_ROWS)]


def _start(job: MadeJob, *program: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *program, str(job.folder)],
        stdin=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=environment,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(KEY.hex() + "\n")
    process.stdin.close()
    return process


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in tasks for child in path.read_text().split()]


def _take_over(job: MadeJob) -> None:
    newest = max((job.folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    shutil.rmtree(job.folder / "resume", ignore_errors=True)
    newest.rename(job.folder / "resume")
    shutil.rmtree(job.folder / "checkpoints")
    (job.folder / "control.sock").unlink(missing_ok=True)


def _weights(job: MadeJob) -> dict[str, torch.Tensor]:
    return load_file(job.folder / "results/model/model.safetensors")


def _until(supervisor: Supervisor, accepts: Callable[[Message], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not any(accepts(message) for message in list(supervisor.messages)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _checkpoint_beyond(step: int) -> Callable[[Message], bool]:
    return lambda message: message.type == "checkpoint" and message.step > step


def _but_for_the_curve(job: MadeJob) -> dict[str, Any]:
    """Counts and what follows from them, which do not round."""
    return {name: value for name, value in job.metrics().items() if name != "train_loss_curve"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, base: Path) -> MadeJob:
    job = _make(tmp_path_factory.mktemp("alone") / "j", base, ranks=1)
    run(job.folder, KEY, Control(None))
    return job


@pytest.fixture(scope="module")
def together(base: Path) -> Iterator[tuple[MadeJob, list[Message]]]:
    """Two ranks from a worker's spare, that nobody interrupts, and what they said."""
    with tempfile.TemporaryDirectory(prefix="pt-") as made:
        root = Path(made)
        trainer = TrainerProcess(root, reach=Reach((base,)), threads=1)
        job = dataclasses.replace(_make(root / "made", base), folder=trainer.folder.path)
        shutil.copytree(root / "made", job.folder, dirs_exist_ok=True)
        trainer.begin(KEY)
        messages: list[Message] = []
        while not any(message.type == "checkpoint" for message in messages):
            messages += trainer.read(1.0)
            trainer.tell(Rows())
            trainer.tell(Allowed(10**6))
        (child,) = _children(trainer.process.pid)
        proc = Path(f"/proc/{child}")
        assert "Seccomp:\t2" in (proc / "status").read_text(), "every rank is shut off"
        seen = (proc / "cmdline").read_text() + (job.folder / "trainer.log").read_text()
        with contextlib.suppress(TrainerGone):
            while True:
                messages += trainer.read(1.0)
        assert trainer.process.wait(180) == 0
        assert KEY.hex() not in seen
        yield job, messages
        trainer.close()


def test_two_ranks_give_what_one_gives(alone: MadeJob, together: tuple[MadeJob, list[Message]]) -> None:
    job, messages = together
    sizes = [
        len(
            poisson_batch(
                JobRandomness(KEY), phase=name, step=step, num_units=alone.spec.plan.num_units, sample_rate=RATE
            )
        )
        for name in ("head", "main")
        for step in range(STEPS)
    ]
    assert {0, 1, 3} <= set(sizes), "empty batches, batches with a rank that has none, and uneven ones"
    expected, got = _weights(alone), _weights(job)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-5)
    assert _but_for_the_curve(job) == _but_for_the_curve(alone)
    curves = [[point["train_loss"] for point in made.metrics()["train_loss_curve"]] for made in (job, alone)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4, abs=1e-4)
    started = [message for message in messages if message.type == "started"]
    assert [(message.ranks, message.threads) for message in started] == [(2, 1)], "rank 0 alone speaks"
    assert messages[-1].type == "finished"
    assert not [message for message in messages if isinstance(message, Notice) and message.code != "computing_features"]


def test_stopped_killed_and_resumed_under_torchrun_it_ends_the_same(
    folder: Path, base: Path, together: tuple[MadeJob, list[Message]]
) -> None:
    job = _make(folder, base)
    supervisor = Supervisor(folder, stop_on=_checkpoint_beyond(3))
    process = _start(job, *TRAINER)
    assert process.wait(180) == 0
    messages = supervisor.finish()
    assert messages[-1].type == "stopped"
    stopped_at = messages[-1].step
    assert 3 < stopped_at < 2 * STEPS
    assert max(int(path.name) for path in (folder / "checkpoints").iterdir()) == stopped_at
    _take_over(job)

    supervisor = Supervisor(folder)
    process = _start(job, *TRAINER)
    _until(supervisor, _checkpoint_beyond(stopped_at))
    (child,) = _children(process.pid)
    os.kill(child, signal.SIGKILL)
    assert process.wait(60) == 1, "a lost rank ends the attempt"
    messages = supervisor.finish()
    assert not [message for message in messages if message.type in ("failed", "stopped", "finished")], "as a crash does"
    _take_over(job)

    process = _start(job, *TORCHRUN)
    assert process.wait(180) == 0
    expected, got = _weights(together[0]), _weights(job)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert job.metrics() == together[0].metrics()


def test_a_rank_that_hangs_does_not_hang_the_job(folder: Path, base: Path) -> None:
    job = _make(folder, base)
    supervisor = Supervisor(folder)
    process = _start(job, "-c", _IMPATIENT)
    _until(supervisor, _checkpoint_beyond(0))
    (child,) = _children(process.pid)
    os.kill(child, signal.SIGSTOP)
    assert process.wait(60) == 1
    supervisor.finish()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:  # it dies with its parent
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


_IMPATIENT = """
import datetime, sys
from torch.distributed import distributed_c10d
from worker.trainer import __main__, ranks
join = ranks._join_group
def join_and_hurry(order):
    join(order)
    distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=4))
ranks._join_group, ranks._STORY_SECONDS = join_and_hurry, 0.1
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ([Notice("computing_features"), Failed("out_of_memory")], [Failed("out_of_memory")]),
        ([Notice("computing_features")], []),
        ([Finished({}, 1.0)], None),
        ([Stopped(0, {})], None),
    ],
    ids=["failed", "killed", "finished", "stopped"],
)
def test_how_another_rank_ended_is_told_and_ends_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[Message], heard: list[Message] | None
) -> None:
    """The code by rank 0's connection; then the process ends, whatever its main thread waits for."""
    exits: list[int] = []
    monkeypatch.setattr(ranks_module.os, "_exit", exits.append)
    folder.mkdir()
    supervisor = Supervisor(folder)
    ours, theirs = socket.socketpair()
    ranks = Ranks(Order(folder, KEY), Control.connect(folder), [theirs])
    ours.sendall(b"".join(encode(message) for message in said))
    ours.close()
    for watcher in ranks._watchers:
        watcher.start()
        watcher.join(10)
    ranks.close()
    assert exits == ([] if heard is None else [1])
    assert supervisor.finish() == (heard or [])
    theirs.close()


def test_ranks_of_several_hosts_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="one host"):
        receive([str(tmp_path)])


def test_an_order_shows_no_key(tmp_path: Path) -> None:
    order = Order(tmp_path, KEY, 1, 2, "ranks-0")
    assert Order.from_line(order.to_line()) == order
    assert KEY.hex() not in repr(order)
    assert repr(KEY) not in repr(order)
