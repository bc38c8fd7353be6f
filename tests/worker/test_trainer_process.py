"""The supervisor's end of a trainer: key, environment, messages, ends. Scripted children stand for protocol corners."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app import processes
from app.settings import Settings
from worker.job_folder import kept_back_from, remove_abandoned
from worker.spares import Spares
from worker.trainer.messages import Failed, Message, Notice, Progress, Stopped
from worker.trainer_process import BadMessage, TrainerGone, TrainerProcess

#: What every script starts with: the order from standard input, and the socket that it names.
OPENING = """
import json, os, socket, sys, time
order = json.loads(sys.stdin.readline())
control = socket.socket(socket.AF_UNIX)
control.connect(os.path.join(order["folder"], "control.sock"))
def say(**message):
    control.sendall(json.dumps(message).encode() + b"\\n")
"""

Start = Callable[[str], TrainerProcess]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return processes.socket_folder(tmp_path, "jobs")


@pytest.fixture
def start(root: Path) -> Iterator[Start]:
    started: list[TrainerProcess] = []

    def starter(script: str) -> TrainerProcess:
        trainer = TrainerProcess(root, program=[sys.executable, "-c", OPENING + script])
        started.append(trainer)
        return trainer

    yield starter
    for trainer in started:
        trainer.close()


def read_all(trainer: TrainerProcess) -> list[Message]:
    """Every message until it is gone."""
    messages: list[Message] = []
    deadline = time.monotonic() + 20
    try:
        while time.monotonic() < deadline:
            messages += trainer.read(0.5)
    except TrainerGone:
        return messages
    raise AssertionError("the trainer did not end")


def test_messages_arrive_in_order_and_all_of_them_before_the_end(start: Start) -> None:
    trainer = start(
        'for step in range(500): say(type="progress", step=step, num_steps=500, phase="main", executed={"main": step})'
    )
    trainer.begin(b"k" * 32)
    messages = read_all(trainer)
    assert [message.step for message in messages if isinstance(message, Progress)] == list(range(500))


def test_a_spare_that_waits_is_taken_and_one_that_died_is_not(tmp_path: Path) -> None:
    spares = Spares(Settings(data_dir=tmp_path))
    try:
        spare = spares._spare
        assert spare is not None
        taken = spares.take()
        assert taken is spare
        taken.close()
        spares.prepare()
        died = spares._spare
        assert died is not None
        died.kill()
        taken = spares.take()
        assert taken is not died
        taken.close()
        assert not died.folder.path.exists()
    finally:
        spares.close()


def test_how_it_ended_is_known_though_its_socket_closes_first(start: Start) -> None:
    trainer = start("control.close(); time.sleep(0.3); os.kill(os.getpid(), 9)")
    trainer.begin(b"k" * 32)
    assert read_all(trainer) == []
    assert trainer.status() == -9


def test_one_that_ended_before_anybody_looked_is_still_heard(start: Start) -> None:
    trainer = start('say(type="failed", code="data_mismatch")')
    trainer.begin(b"k" * 32)
    trainer.process.wait(20)
    assert read_all(trainer) == [Failed("data_mismatch")]


def test_a_message_that_comes_in_pieces_is_one_message(start: Start) -> None:
    trainer = start(
        'line = json.dumps({"type": "notice", "code": "computing_features", "data": {}}).encode() + b"\\n"\n'
        "for byte in line: control.sendall(bytes([byte]))"
    )
    trainer.begin(b"k" * 32)
    assert read_all(trainer) == [Notice("computing_features")]


@pytest.mark.parametrize("line", ["no json", '{"type": "unknown"}', '{"type": "progress", "step": 1}', "[1]"])
def test_what_is_no_message_is_refused(start: Start, line: str) -> None:
    trainer = start(f"control.sendall({line!r}.encode() + b'\\n'); time.sleep(60)")
    trainer.begin(b"k" * 32)
    with pytest.raises(BadMessage):
        read_all(trainer)


def test_a_line_without_an_end_is_refused(start: Start) -> None:
    trainer = start("control.sendall(b'x' * (2 << 20)); time.sleep(60)")
    trainer.begin(b"k" * 32)
    with pytest.raises(BadMessage):
        read_all(trainer)


def test_stop_reaches_it_and_its_answer_comes_back(start: Start) -> None:
    trainer = start(
        'say(type="notice", code="ready", data={})\n'
        "assert json.loads(control.makefile().readline()) == {'type': 'stop'}\n"
        'say(type="stopped", step=3, executed={"main": 3})'
    )
    trainer.begin(b"k" * 32)
    while not trainer.read(0.5):
        pass
    trainer.stop()
    assert read_all(trainer) == [Stopped(3, {"main": 3})]


def test_one_that_dies_before_it_connects_is_gone_and_does_not_hang(root: Path) -> None:
    trainer = TrainerProcess(root, program=[sys.executable, "-c", "raise SystemExit(3)"])
    try:
        trainer.process.wait(10)
        trainer.begin(b"k" * 32)  # a broken pipe is no error of the caller
        with pytest.raises(TrainerGone):
            trainer.read(10.0)
        assert not trainer.waits()
    finally:
        trainer.close()


def test_a_kill_ends_a_reader_in_another_thread(start: Start) -> None:
    trainer = start('say(type="notice", code="ready", data={}); time.sleep(60)')
    trainer.begin(b"k" * 32)
    while not trainer.read(0.5):
        pass
    trainer.kill()
    assert read_all(trainer) == []


def test_its_environment_holds_no_credential_and_the_key_is_in_no_file(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DATABASE_URL", "REDIS_URL", "STORAGE_URL", "PRIVTUNE_SECRET_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret-value")
    for name in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"):
        monkeypatch.setenv(name, "BF16")  # would multiply float32 matrices in bfloat16
    trainer = start(
        "open('environment', 'w').write(json.dumps(dict(os.environ)))\n"
        "open('arguments', 'w').write(json.dumps(sys.argv))\n"
        'say(type="notice", code="ready", data={}); time.sleep(60)'
    )
    key = bytes(range(32))
    trainer.begin(key)
    while not trainer.read(0.5):
        pass
    folder = trainer.folder.path
    environment = (folder / "environment").read_text()
    assert "secret-value" not in environment
    assert "FPMATH_MODE" not in environment
    assert f'"HOME": "{folder}"' in environment
    assert '"HF_HUB_OFFLINE": "1"' in environment
    assert '"GOMP_SPINCOUNT": "1000"' in environment
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"environment", "arguments", "trainer.log"} <= {path.name for path in files}
    for path in files:
        assert key.hex().encode() not in path.read_bytes()
    assert key.hex().encode() not in Path(f"/proc/{trainer.process.pid}/cmdline").read_bytes()
    assert key.hex().encode() not in Path(f"/proc/{trainer.process.pid}/environ").read_bytes()


def test_where_it_failed_is_told_without_what_was_said(root: Path, tmp_path: Path) -> None:
    module = tmp_path / "broken.py"
    module.write_text("def label_of(row):\n    raise KeyError(row)\nlabel_of('a\\nMrs Patient: HIV positive\\n')\n")
    trainer = TrainerProcess(root, program=[sys.executable, str(module)])
    try:
        with pytest.raises(TrainerGone):
            trainer.read(10.0)
        told = trainer.where_it_failed()
        assert told["error"] == "KeyError"
        assert [str(frame).rpartition("/")[2] for frame in told["frames"]] == [  # type: ignore[attr-defined]
            "broken.py:3 <module>",
            "broken.py:2 label_of",
        ]
        assert "Patient" not in str(told)
        assert "Patient" in (trainer.folder.path / "trainer.log").read_text()
    finally:
        trainer.close()


def test_folders_are_private_removed_at_the_end_and_after_a_kill_by_the_next(root: Path, start: Start) -> None:
    trainer = start("time.sleep(60)")
    folder = trainer.folder.path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    left_behind = root / "job-of-a-killed-worker"
    left_behind.mkdir()
    (left_behind / ".lock").touch()
    (left_behind / "rows.parquet").write_bytes(b"private")
    assert remove_abandoned(root) == 1
    assert not left_behind.exists()
    assert folder.exists()
    trainer.close()
    assert not folder.exists()
    assert os.listdir(root) == [".lock"]


def test_rows_that_could_not_be_removed_are_removed_by_the_next_worker(
    root: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = start("time.sleep(60)")
    kept_back = kept_back_from(trainer.folder.path)
    kept_back.mkdir()
    (kept_back / "rows.parquet").write_bytes(b"private")
    (trainer.folder.path / "data").mkdir()
    (trainer.folder.path / "data" / "rows.parquet").write_bytes(b"given before")
    remove = shutil.rmtree

    def sometimes(path: Path, **options: bool) -> None:
        if path != kept_back:  # as where the disk does not answer
            remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", sometimes)
        trainer.close()
        assert os.listdir(trainer.folder.path) == [".lock"]
        assert remove_abandoned(root) == 0
    assert remove_abandoned(root) == 1
    assert os.listdir(root) == [".lock"]
