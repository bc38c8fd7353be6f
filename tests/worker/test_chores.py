"""The sweep outlives whatever one of its chores meets."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from app.files import service as files
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
