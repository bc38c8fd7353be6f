"""How far a trainer may go ahead of what is written down, and what a worker that vanishes with it leaves in doubt."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

from app.budgets.tables import Reservation
from app.db.session import Database
from app.jobs import lifecycle
from app.jobs.tables import Job
from app.privacy.plan import SampledGaussian
from tests.running import until
from tests.worker.conftest import Scripted
from worker.allowance import AT_HAND, SECONDS, Allowance, Until
from worker.workplace import Workplace

Work = Callable[..., Scripted]
Read = Callable[[], Job]

#: A trainer that obeys: no step before it is allowed. It says no more of it than what it waits with, and dies at the
#: step `last`.
OBEYING = """
lines, allowed, step = control.makefile(), 0, {begun}
started()
def said():
    return {{"centring": 1, "head": step - 1}} if step else {{}}
while step < {last}:
    if step >= allowed:
        if step:
            progress(said())
        allowed = json.loads(lines.readline())["step"]
        continue
    step += 1
    open({made!r}, "w").write(f"{{step}} {{os.getpid()}}")
"""


def test_steps_that_a_lost_worker_was_never_told_of_are_in_doubt_until_a_checkpoint_passes_them(
    work: Work,
    job: Read,
    workplace: Workplace,
    database: Database,
    client: TestClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Worker and trainer fall silent together, between two heartbeats, some steps behind the trainer's last word."""
    made = tmp_path / "made"
    with monkeypatch.context() as patch:
        patch.setattr(workplace.settings, "heartbeat_seconds", 60.0)
        script = OBEYING.format(begun=0, last=40, made=str(made)) + "time.sleep(60)"
        lost = threading.Thread(target=work, args=(script,))
        lost.start()
        until(lambda: made.exists() and made.read_text().startswith("40 "))
    with database.writing() as session:
        session.execute(update(Job).values(lease_expires_at=0.0))
    with database.writing() as session:
        assert lifecycle.sweep(session, workplace.settings) == [job().id]
    os.kill(int(made.read_text().split()[1]), signal.SIGKILL)
    lost.join()
    assert (job().status, job().interrupted) == ("queued", True)

    behind = {"centring": 1, "head": 10}
    cancelled = threading.Thread(
        target=work,
        args=(f"started(); checkpoint({behind}); wait_for_stop(); say(type='stopped', step=11, executed={behind})",),
    )
    cancelled.start()
    until(lambda: job().checkpoint)
    client.post(f"/v1/fine_tuning/jobs/{job().id}/cancel")
    cancelled.join()
    with database.reading() as session:
        reservation = session.scalars(select(Reservation)).one()
    assert job().status == "cancelled"
    assert job().interrupted
    assert reservation.rho_charged == reservation.rho > 0.0


def test_a_database_that_does_not_answer_for_a_moment_keeps_the_trainer_waiting_and_loses_nothing(
    work: Work, job: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = lifecycle.allow, []

    def sometimes(*arguments: Any) -> None:
        if len(refused) < 3:
            refused.append(arguments)
            raise OperationalError("COMMIT", {}, OSError("connection lost"))
        real(*arguments)

    monkeypatch.setattr(lifecycle, "allow", sometimes)
    work(OBEYING.format(begun=0, last=20, made=str(tmp_path / "made")) + "results(); finish()")
    assert len(refused) == 3
    assert (job().status, job().attempts) == ("succeeded", 1)


def test_no_row_is_handed_over_before_it_is_written_down(
    work: Work, job: Read, reservation: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a worker that vanishes would leave it unsaid, and be charged nothing."""
    real, refused = lifecycle.give_rows, []
    script = f"say(type='ready'); time.sleep(1); open({str(tmp_path / 'seen')!r}, 'w').write(str(os.listdir(folder)));"

    def sometimes(*arguments: Any) -> None:
        refused.append(arguments)
        if len(refused) < 8:
            raise OperationalError("COMMIT", {}, OSError("connection lost"))
        assert "'data'" not in (tmp_path / "seen").read_text()
        real(*arguments)

    monkeypatch.setattr(lifecycle, "give_rows", sometimes)
    work(script + "ready = hear; started(); progress({'head': 1}); results(); finish()")
    assert len(refused) == 8
    assert (job().status, job().attempts) == ("succeeded", 1)


@pytest.mark.parametrize("ending", ["cancel", "shutdown"])
def test_one_that_ends_before_a_step_was_allowed_has_made_none(
    work: Work,
    job: Read,
    client: TestClient,
    database: Database,
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
) -> None:
    """A trainer that is asked to stop while it waits would make the step at hand, which is not written down."""
    tried = threading.Event()

    def unreachable(*_: Any) -> None:
        tried.set()
        raise OperationalError("COMMIT", {}, OSError("connection lost"))

    def end() -> None:
        tried.wait(60)
        if ending == "cancel":
            client.post(f"/v1/fine_tuning/jobs/{job().id}/cancel")
        else:
            workplace.shutting_down.set()

    monkeypatch.setattr(lifecycle, "allow", unreachable)
    asked = threading.Thread(target=end)
    asked.start()
    work(
        "started(); wait_for_stop(); checkpoint({'centring': 1}); say(type='stopped', step=1, executed={'centring': 1})"
    )
    with database.reading() as session:
        reservation = session.scalars(select(Reservation)).one()
    if ending == "cancel":
        assert (job().status, reservation.state, reservation.rho_charged) == ("cancelled", "settled", 0.0)
    else:
        assert (job().status, job().attempts, reservation.state) == ("queued", 0, "reserved")


@pytest.mark.parametrize(
    "beyond",
    [
        "stands({'centring': 1, 'head': 30})",
        "allowed = 10**9; checkpoint({'centring': 1, 'head': 30})",
        "allowed = 10**9; results(); finish()",
        "wait_for_stop(); say(type='stopped', step=31, executed={'centring': 1, 'head': 30})",
    ],
    ids=["progress", "checkpoint", "finished", "stopped"],
)
def test_a_trainer_that_went_beyond_its_allowance_ends_the_job_and_is_charged_in_full(
    work: Work, job: Read, client: TestClient, beyond: str
) -> None:
    """Had worker and database been lost with it, nobody would have known of those steps."""
    worker = threading.Thread(target=work, args=(f"started(); {beyond}; time.sleep(60)",))
    worker.start()
    if "stop" in beyond:
        until(lambda: (job().progress or {}).get("allowed"))
        client.post(f"/v1/fine_tuning/jobs/{job().id}/cancel")
    worker.join()
    assert (job().status, job().error["code"]) == ("failed", "trainer_error")  # type: ignore[index]
    assert (job().interrupted, job().checkpoint, job().fine_tuned_model) == (True, None, None)


def steps_allowed(*parts: tuple[int, float]) -> list[Until]:
    """To a trainer that takes so long for each of so many steps of a part, and tells five times a second, or where it
    waits."""
    clock = [0.0]
    plan = SimpleNamespace(parts=[SampledGaussian("head", 0.1, count, 1.0, 1.0, "flat") for count, _ in parts])
    allowance = Allowance(SimpleNamespace(plan=plan), lambda: clock[0])  # type: ignore[arg-type]
    first = allowance.after(0)
    assert first is not None
    given, told = [first], 0.0
    for step, seconds in enumerate(seconds for count, seconds in parts for _ in range(count)):
        if step == given[-1].told or clock[0] - told >= 0.2:
            told = clock[0]
            more = allowance.after(step)
            given += [] if more is None else [more]
        assert step < given[-1].told, "it would wait for ever"
        clock[0] += seconds
    assert allowance.after(sum(count for count, _ in parts)) is None
    return given


def test_an_allowance_is_of_some_seconds_and_never_beyond_the_plan() -> None:
    for seconds_a_step in (0.001, 0.02, 1.0, 60.0):
        given = steps_allowed((2000, seconds_a_step))
        steps = [until.told for until in given]
        assert steps == sorted(set(steps))
        assert (steps[-1], given[-1].noted) == (2000, 2000)
        assert all(until.told <= until.noted <= until.told + AT_HAND for until in given)
        ahead = [late - early for early, late in pairwise(steps)]
        assert max(ahead) <= max(2, 1.01 * SECONDS / seconds_a_step)
        assert len(given) <= 10 + 3 * 2000 * max(seconds_a_step / SECONDS, 1 / 3), (seconds_a_step, len(given))


def test_an_allowance_of_quick_steps_holds_for_none_of_a_slower_part() -> None:
    """A head on kept features makes hundreds of steps a second; after it, each may take minutes."""
    given = steps_allowed((1, 0.5), (100, 0.001), (60, 20.0), (1, 1.0))
    assert {1, 101, 161, 162} <= {until.told for until in given}
    slow = [until.told for until in given if until.told > 101]
    assert slow == [*range(103, 163)]
