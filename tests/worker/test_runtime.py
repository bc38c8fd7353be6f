"""Where and how an attempt computes, memory above all: frozen by the first one; what it costs where it does not do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db.session import Database
from app.models.tables import Model
from tests.worker.conftest import SUCCESS, Read, Work, charged_in_full, charged_nothing
from worker.workplace import Workplace


def test_out_of_memory_halves_the_physical_batch_and_tries_again(
    work: Work, job: Read, client: TestClient, workplace: Workplace
) -> None:
    work("spec['runtime']['max_physical_batch_tokens'] = 4096; started(); say(type='failed', code='out_of_memory')")
    assert job().status == "queued"
    assert job().runtime["max_physical_batch_tokens"] == 2048  # type: ignore[index]  # half of what was measured
    work(SUCCESS)
    assert job().status == "succeeded"
    history = json.dumps(client.get(f"/v1/fine_tuning/jobs/{job().id}/events").json())
    assert "batch_size_reduced" in history


OOM_BEFORE_ANY_ROW = "say(type='failed', code='out_of_memory')"


def test_memory_that_does_not_even_hold_the_model_costs_attempts_but_no_budget(
    work: Work, job: Read, workplace: Workplace, reservation: Any
) -> None:
    """With a physical batch that the operator fixed, it is halved each time."""
    object.__setattr__(workplace.settings, "max_physical_batch_tokens", 4096)
    for attempt in (1, 2):
        work(OOM_BEFORE_ANY_ROW)
        assert (job().status, job().attempts, job().interrupted) == ("queued", attempt, False)
    work(OOM_BEFORE_ANY_ROW)
    assert (job().status, job().error["code"]) == ("failed", "out_of_memory")  # type: ignore[index]
    assert charged_nothing(reservation())


@pytest.mark.parametrize("read", ["ready();" + OOM_BEFORE_ANY_ROW, "started();" + OOM_BEFORE_ANY_ROW])
def test_one_attempt_that_ran_out_of_memory_over_rows_is_charged_in_full_whatever_came_after(
    work: Work, job: Read, workplace: Workplace, reservation: Any, read: str
) -> None:
    object.__setattr__(workplace.settings, "max_physical_batch_tokens", 4096)
    for script in (read, OOM_BEFORE_ANY_ROW, OOM_BEFORE_ANY_ROW):
        work(script)
    assert job().status == "failed"
    assert charged_in_full(reservation())


def test_runtime_options_stay_those_of_the_first_attempt(work: Work, job: Read, workplace: Workplace) -> None:
    work("started(); os.kill(os.getpid(), 9)")
    first = job().runtime
    object.__setattr__(workplace.settings, "max_physical_batch_tokens", 128)
    work(f"assert spec['runtime'] == {first!r}; started(); results(); finish()")
    assert job().status == "succeeded"


def test_what_auto_came_to_holds_for_later_attempts_and_is_reported(
    work: Work, job: Read, workplace: Workplace, client: TestClient
) -> None:
    object.__setattr__(workplace.settings, "device", "auto")
    object.__setattr__(workplace.settings, "threads", 0)
    work("assert spec['runtime']['device'] == 'auto'; started(); os.kill(os.getpid(), 9)")
    ran = {"device": "cpu", "threads": 1, "ranks": 2}
    assert ran.items() <= job().runtime.items()  # type: ignore[union-attr]
    work(f"assert {ran}.items() <= spec['runtime'].items(); " + SUCCESS)
    assert job().status == "succeeded"
    report = client.get(f"/v1/models/{job().fine_tuned_model}/privacy_report").json()
    assert ran.items() <= report["runtime"].items()


def test_the_report_of_a_first_attempt_says_what_ran(
    work: Work, job: Read, workplace: Workplace, database: Database
) -> None:
    object.__setattr__(workplace.settings, "device", "auto")
    work(SUCCESS)
    with database.reading() as session:
        report = session.scalars(select(Model.privacy_report).where(Model.job_id == job().id)).one()
    assert (report["runtime"]["device"], report["runtime"]["threads"]) == ("cpu", 1)
