"""The sweep outlives whatever one of its chores meets."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update

from app.db.session import Database
from app.files import processing
from app.files import service as files
from app.jobs.tables import Job
from worker import chores
from worker.workplace import Workplace


def test_a_chore_that_fails_stops_neither_the_others_nor_the_next_sweep(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = threading.Semaphore(0)

    def poison(*_: Any) -> Any:
        raise ValueError("a row of another time")

    monkeypatch.setattr(chores.submission, "plan_waiting", poison)
    monkeypatch.setattr(files, "sweep", lambda *_: swept.release())
    workplace.settings.sweep_seconds = 0.05
    with chores.Sweeper(workplace):
        for _ in range(3):
            assert swept.acquire(timeout=20)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_whose_sweep_ends_ends_too(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    ended = threading.Event()

    def end(*_: Any) -> None:
        raise SystemExit  # what no chore's handler takes

    def kill(pid: int, number: int) -> None:
        asked.append((pid, number))
        ended.set()

    monkeypatch.setattr(chores, "sweep", end)
    monkeypatch.setattr(chores.os, "kill", kill)
    workplace.settings.sweep_seconds = 0.05
    with chores.Sweeper(workplace):
        assert ended.wait(20)
    assert asked == [(os.getpid(), signal.SIGTERM)]


def _end(database: Database, status: str, seconds_ago: float) -> None:
    with database.writing() as session:
        session.execute(update(Job).values(status=status, finished_at=chores.lifecycle.now() - seconds_ago))


def test_all_that_an_ended_job_left_is_erased_once(
    workplace: Workplace, submitted: str, job: Callable[[], Job], database: Database, stored: Any
) -> None:
    project = job().project_id
    checkpoint = f"projects/{project}/jobs/{submitted}/1/checkpoints/3/state.json"
    bundle = f"projects/{project}/models/{submitted}/1/model.safetensors"

    def leave() -> None:
        for key in (checkpoint, bundle):
            workplace.storage.put_bytes(key, b"killed before its commit")

    leave()
    chores.sweep(workplace)
    assert stored(submitted) == [checkpoint, bundle]  # queued: the next claim's to clear
    _end(database, "cancelled", seconds_ago=0.0)
    chores.sweep(workplace)
    assert stored(submitted) == [checkpoint, bundle]  # a worker may not know yet
    _end(database, "cancelled", seconds_ago=workplace.settings.lease_seconds + 1.0)
    chores.sweep(workplace)
    assert stored(submitted) == []
    assert job().erased_at is not None
    leave()
    chores.sweep(workplace)
    assert stored(submitted) == [checkpoint, bundle]  # a job that is done with is not looked at for ever


def test_the_published_model_of_an_ended_job_stays(
    workplace: Workplace, work: Any, job: Callable[[], Job], database: Database, stored: Any
) -> None:
    work("started(); progress({'head': 1}); results(); finish()")
    published = stored("/models/")
    assert published
    stray = f"projects/{job().project_id}/models/{job().id}/{job().fence + 1}/model.safetensors"
    workplace.storage.put_bytes(stray, b"killed before its commit")
    _end(database, "succeeded", seconds_ago=workplace.settings.lease_seconds + 1.0)
    chores.sweep(workplace)
    assert stored("/models/") == published


def test_rows_of_a_worker_that_was_killed_are_removed(workplace: Workplace) -> None:
    incoming = processing._incoming(workplace.settings)
    for name in ("killed", "working", "starting"):
        (incoming / name).mkdir()
        (incoming / name / "source").write_bytes(b"text,label")
    for name in ("killed", "working"):
        os.utime(incoming / name, (0.0, 0.0))
    held = os.open(incoming / "working", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    chores.sweep(workplace)
    assert sorted(path.name for path in incoming.iterdir()) == ["starting", "working"]
    os.close(held)
    chores.sweep(workplace)
    assert [path.name for path in incoming.iterdir()] == ["starting"]


def test_a_worker_holds_the_folder_that_it_reads_in(workplace: Workplace) -> None:
    with processing._work_folder(workplace.settings, "file-1") as folder:
        (folder / "source").write_bytes(b"text,label")
        os.utime(folder, (0.0, 0.0))
        chores.sweep(workplace)
        assert (folder / "source").exists()
    assert not folder.exists()
