"""Messages over a real socket: what a supervisor hears, and that Stop is honoured within a step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.catalog.adaptations import Freeze
from app.tether import importable
from tests.running import until
from tests.trainer.encoders import MASKED, make_encoder_base
from tests.trainer.jobs import DEVICE, KEY, make_job, rows
from worker.allowance import AT_HAND
from worker.trainer import loop
from worker.trainer.control import Control
from worker.trainer.messages import Allowed, Failed, Message, Notice, Ready, Rows, Stop, decode, encode
from worker.trainer.run import attempt


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: a socket's address has about a hundred bytes."""
    with tempfile.TemporaryDirectory(prefix="pt-") as made:
        yield Path(made) / "j"


class Supervisor:
    """The other end of the socket: notes every message, and says Stop after the first that `stop_on` accepts. Gives the
    rows to whoever is ready for them.

    allowed: how many steps it lets the job make.
    """

    def __init__(self, folder: Path, stop_on: Any = None, *, allowed: int = 10**6) -> None:
        if (folder / "data").exists():
            (folder / "data").rename(folder / "kept back")
        self.messages: list[Message] = []
        self._stop_on = stop_on
        self._allowed = allowed
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / "control.sock"))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, args=(folder,))
        self._thread.start()

    def _serve(self, folder: Path) -> None:
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rb") as lines:
            self.allow = lambda step: connection.sendall(encode(Allowed(step)))
            with contextlib.suppress(BrokenPipeError):  # it had only something to say
                self.allow(self._allowed)
            for line in lines:
                self.messages.append(decode(line))
                if isinstance(self.messages[-1], Ready):
                    (folder / "kept back").rename(folder / "data")
                    connection.sendall(encode(Rows()))
                if self._stop_on is not None and self._stop_on(self.messages[-1]):
                    connection.sendall(encode(Stop()))
                    self._stop_on = None

    def finish(self) -> list[Message]:
        self._thread.join(30)
        self._listener.close()
        return self.messages

    def of_type(self, kind: str) -> list[Any]:
        return [message for message in self.messages if message.type == kind]


@pytest.mark.parametrize(
    ("broken", "failed"),
    [
        ("adaptation", [Failed("nothing_to_train")]),
        ("base", [Failed("base_model_invalid")]),
        ("label", [Ready(), Failed("data_mismatch")]),
    ],
)
def test_what_needs_no_row_is_done_before_they_are_there(
    tmp_path: Path, folder: Path, broken: str, failed: list[Message]
) -> None:
    """What fails before depends on none of them: nothing is charged for it."""
    data = [(text, "neither") if broken == "label" else (text, label) for text, label in rows()]
    base = make_encoder_base(tmp_path / "base", "masked", "bert")
    job = make_job(folder, base, data=data)
    spec = job.spec
    if broken == "adaptation":
        phase = dataclasses.replace(spec.phases[-1], adaptation=Freeze(("*",)))
        spec = dataclasses.replace(spec, task=MASKED, phases=(phase,), evaluation="none")
        spec = dataclasses.replace(spec, plan=dataclasses.replace(spec.plan, parts=(spec.plan.part(phase.name),)))
    elif broken == "base":
        (base / "model.safetensors").write_bytes(b"nothing")
    spec.write(folder)
    supervisor = Supervisor(folder)
    control = Control.connect(folder)
    assert not attempt(folder, KEY, control)
    control.close()
    assert [told for told in supervisor.finish() if told.type != "notice"] == failed


def test_a_job_tells_its_story(folder: Path, base: Path) -> None:
    job = make_job(folder, base, checkpoint_seconds=0, steps=2)
    supervisor = Supervisor(folder)
    control = Control.connect(folder)
    assert attempt(folder, KEY, control)
    control.close()
    kinds = [message.type for message in supervisor.finish()]
    assert kinds[:4] == ["ready", "truncation", "started", "notice"]
    assert kinds[-1] == "finished"
    (started,), (cut,) = supervisor.of_type("started"), supervisor.of_type("truncation")
    assert (cut.dataset, cut.rows, cut.cut) == ("training", 60, {"text": {"rows": 0, "tokens": 0}})
    assert (started.device, started.threads, started.trainable_parameters) == (DEVICE, 1, 16 * 2 + 2)
    assert [message.step for message in supervisor.of_type("checkpoint")] == [2, 3]
    last = supervisor.of_type("progress")[-1]
    assert (last.step, last.num_steps) == (4, 4)
    assert last.executed == {"centring": 1, "head": 2, "evaluation": 1}
    assert supervisor.of_type("finished")[0].executed == last.executed
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"2", "3"}, "the supervisor deletes, not we"
    assert job.metrics()["released"] == "private"


def test_progress_is_throttled_but_the_last_step_is_told(folder: Path, base: Path) -> None:
    make_job(folder, base, steps=50, evaluation="none")
    supervisor = Supervisor(folder)
    control = Control.connect(folder)
    assert attempt(folder, KEY, control)
    control.close()
    supervisor.finish()
    steps = [message.step for message in supervisor.of_type("progress")]
    assert len(steps) < 40
    assert steps[-1] == 51


@pytest.mark.parametrize("adaptation", ["head", "lora"])
def test_stop_is_honoured_within_a_step(
    folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch, adaptation: str
) -> None:
    job = make_job(folder, base, adaptation=adaptation, steps=500)
    made: list[int] = []
    marker = Notice("third_step")

    class Counting(loop.PrivateStep):
        def run(self, step: int, micro_batches: Any) -> Any:
            released = super().run(step, micro_batches)
            made.append(step)
            if len(made) == 3:  # Stop arrives while this step is at hand
                control.send(marker)
                assert control._stop.wait(10)
            return released

    monkeypatch.setattr(loop, "PrivateStep", Counting)
    supervisor = Supervisor(folder, stop_on=lambda message: message == marker)
    control = Control.connect(folder)
    assert attempt(folder, KEY, control)
    control.close()
    supervisor.finish()
    assert len(made) == 3
    stopped = supervisor.of_type("stopped")
    assert [(message.step, message.executed) for message in stopped] == [(4, {"centring": 1, "head": 3})]
    assert supervisor.messages[-1] is stopped[0]
    assert [message.step for message in supervisor.of_type("checkpoint")] == [4], "a paused job can go on from there"
    assert not (job.folder / "results/model").exists()


def test_no_step_is_made_before_it_is_allowed(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Centring and evaluation are steps, too: 1 + 3 + 1."""
    make_job(folder, base, steps=3)
    made: list[int] = []

    class Counting(loop.PrivateStep):
        def run(self, step: int, micro_batches: Any) -> Any:
            made.append(step)
            return super().run(step, micro_batches)

    monkeypatch.setattr(loop, "PrivateStep", Counting)
    supervisor = Supervisor(folder, allowed=0)
    control = Control.connect(folder)
    running = threading.Thread(target=attempt, args=(folder, KEY, control))
    running.start()
    for allowed in range(5):
        until(lambda allowed=allowed: [told.step for told in supervisor.of_type("progress")][-1:] == [allowed])
        time.sleep(0.2)
        told = [told.step for told in supervisor.of_type("progress")]
        assert (told[-1], len(made)) == (allowed, min(max(allowed - 1, 0), 3))
        assert not supervisor.of_type("finished")
        supervisor.allow(allowed + 1)
    running.join()
    control.close()
    supervisor.finish()
    assert supervisor.messages[-1].type == "finished"


def test_a_trainer_that_waits_stops_where_it_is_asked_to(folder: Path, base: Path) -> None:
    make_job(folder, base, steps=500)
    supervisor = Supervisor(folder, stop_on=lambda message: message.type == "progress" and message.step == 7, allowed=7)
    control = Control.connect(folder)
    assert attempt(folder, KEY, control)
    control.close()
    supervisor.finish()
    (stopped,), (kept,) = supervisor.of_type("stopped"), supervisor.of_type("checkpoint")
    assert stopped.step == kept.step <= 7 + AT_HAND


def test_a_stop_before_the_first_step_executes_nothing(folder: Path, base: Path) -> None:
    make_job(folder, base)
    supervisor = Supervisor(folder, stop_on=lambda message: True)
    control = Control.connect(folder)
    control.send(Notice("hello"))
    assert control._stop.wait(10)
    assert attempt(folder, KEY, control)
    control.close()
    supervisor.finish()
    assert supervisor.of_type("stopped")[0].executed == {}
    assert not supervisor.of_type("checkpoint")


def test_a_lost_supervisor_stops_the_job(folder: Path, base: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    control = Control(ours)
    theirs.close()
    assert control._stop.wait(10)
    make_job(folder, base, steps=100_000)
    assert attempt(folder, KEY, control)
    assert not (folder / "results/model").exists()
    control.close()


def test_a_warm_spare_takes_its_job_from_one_line(folder: Path, base: Path) -> None:
    job = make_job(folder, base)
    supervisor = Supervisor(folder)
    order = json.dumps({"folder": str(folder), "key": KEY.hex()}) + "\n"
    done = subprocess.run(
        [sys.executable, "-m", "worker.trainer"],
        input=order,
        env=importable(os.environ),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    supervisor.finish()
    assert not [m for m in supervisor.of_type("notice") if m.code in ("sandbox_unavailable", "files_in_reach")]
    assert supervisor.messages[-1].type == "finished"
    assert (folder / "trainer.log").exists()
    assert KEY.hex() not in (folder / "trainer.log").read_text()
    assert (job.folder / "results/model/model.safetensors").exists()


def test_a_trainer_dies_with_its_parent() -> None:
    """The child holds one end of a pipe, and waits for a line that never comes: only its death closes the pipe."""
    child = (
        "import sys; from worker.trainer.sandbox import die_with_parent; die_with_parent(); print(1); sys.stdin.read()"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-u', '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout.read() == ""
    process.stdout.close()
    process.stdin.close()
