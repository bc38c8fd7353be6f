"""What a supervisor does with whatever its trainer says or does: each end is settled once, and only what may leaves."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

from app.db.session import Database
from app.files.tables import File
from app.jobs import lifecycle, settlement
from app.jobs.tables import Job, JobKey
from tests.running import until
from tests.worker.conftest import SUCCESS, Read, Work, charged_in_full, charged_nothing
from worker import supervisor
from worker.workplace import Workplace

CANCELLED_AFTER_THREE = (
    "started(); progress({'centring': 1, 'head': 2}); wait_for_stop(); "
    "say(type='stopped', step=3, executed={'centring': 1, 'head': 2})"
)


def test_a_job_that_finishes_is_published_and_settled_once(
    work: Work, job: Read, client: TestClient, reservation: Any, database: Database, stored: Any
) -> None:
    work(SUCCESS)
    assert job().status == "succeeded"
    assert charged_in_full(reservation())
    files = client.get(f"/v1/models/{job().fine_tuned_model}/files").json()["data"]
    assert [file["path"] for file in files] == [
        "README.md",
        "config.json",
        "metrics.json",
        "model.safetensors",
        "privacy_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    with database.reading() as session:
        assert session.scalars(select(JobKey)).all() == []
    assert stored("checkpoints") == []
    assert work(SUCCESS).taken == []  # the hint came twice: nothing is claimed


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "code",
    [
        {"auto_map": {"AutoConfig": "somebody/else--x.Y"}},
        {"auto_map": "x.Y"},
        {"custom_pipelines": {"image-classification": {"impl": "somebody/else--x.Y", "pt": []}}},
    ],
)
def test_a_bundle_that_names_other_code_than_ours_is_not_published(
    work: Work, job: Read, stored: Any, name: str, code: Any
) -> None:
    """Whoever is used to trust our file would run it."""
    work(f"started(); results(); write('model/{name}', json.dumps({code!r})); finish()")
    assert (job().status, job().error["code"]) == ("failed", "trainer_error")  # type: ignore[index]
    assert (job().fine_tuned_model, stored("models/")) == (None, [])


CUT = (
    "ready();"
    "say(type='truncation', dataset='training', rows=60, tokens=987654321, cut={'text': {'rows': 7, 'tokens': 77}});"
)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("started(); say(type='failed', code='missing_gradient_norm')", "missing_gradient_norm"),
        ("started(); say(type='failed', code='Mrs Patient')", "trainer_error"),
        ("started(); finish()", "trainer_error"),  # no results
        ("started(); results({'released': 'private', 'accuracy': 0.5}); finish()", "trainer_error"),  # not as planned
        ("started(); results(); finish({'head': 1})", "trainer_error"),  # not the whole plan
        ("started(); say(type='stopped', step=0, executed={})", "trainer_error"),  # nobody asked
    ],
)
def test_a_failure_is_told_by_its_code_and_charged_in_full(
    work: Work, job: Read, reservation: Any, client: TestClient, script: str, code: str
) -> None:
    work(script)
    assert job().status == "failed"
    assert job().error["code"] == code  # type: ignore[index]
    assert charged_in_full(reservation())
    assert "Patient" not in client.get(f"/v1/fine_tuning/jobs/{job().id}").text
    assert job().fine_tuned_model is None


BEFORE_ANY_ROW = "say(type='failed', code='nothing_to_train')"


def test_a_failure_before_any_row_was_read_costs_nothing(
    work: Work, job: Read, reservation: Any, client: TestClient
) -> None:
    work("say(type='notice', code='sandbox_unavailable', data={}); " + BEFORE_ANY_ROW)
    assert (job().status, job().error["code"]) == ("failed", "nothing_to_train")  # type: ignore[index]
    assert charged_nothing(reservation())
    shown = client.get(f"/v1/fine_tuning/jobs/{job().id}").json()["privacy"]
    assert (shown["epsilon_spent"], shown["charged_in_full"]) == (0.0, False)


@pytest.mark.parametrize("read", ["ready();", CUT, "started();", CUT + "started(); progress({'centring': 1});"])
def test_a_trainer_that_was_given_the_rows_may_have_read_them(
    work: Work, job: Read, reservation: Any, read: str
) -> None:
    work(read + BEFORE_ANY_ROW)
    assert job().status == "failed"
    assert charged_in_full(reservation())


NO_ROWS = "assert not os.path.exists(os.path.join(folder, 'data'));"
ROWS = "assert os.listdir(os.path.join(folder, 'data')) == ['training.parquet'];"


def test_a_trainer_has_no_row_before_it_has_said_that_it_needs_none(work: Work, job: Read) -> None:
    work(
        NO_ROWS
        + "say(type='notice', code='sandbox_unavailable', data={}); time.sleep(0.3);"
        + NO_ROWS
        + "ready();"
        + ROWS
        + SUCCESS
    )
    assert job().status == "succeeded"


@pytest.mark.parametrize(
    "spoken", [CUT.replace("ready();", ""), "say(type='started', device='cpu', threads=1, ranks=1, **sizes);"]
)
def test_whoever_speaks_of_rows_without_any_is_not_believed(
    work: Work, job: Read, reservation: Any, spoken: str
) -> None:
    """It cannot have read one, whatever it says: attempts are lost, nothing is charged."""
    sizes = "sizes = dict(trainable_parameters=1, total_parameters=2, max_physical_batch_tokens=64);"
    for _ in range(3):
        work(sizes + spoken + "wait_for_stop()")
    assert (job().status, job().attempts) == ("failed", 3)
    assert charged_nothing(reservation())


def test_a_failure_before_any_row_is_charged_what_attempts_before_executed(
    work: Work, job: Read, once_started: Any, reservation: Any, workplace: Workplace
) -> None:
    once_started(workplace.shutting_down.set)
    work(
        "started(); wait_for_stop(); checkpoint({'centring': 1, 'head': 1});"
        "say(type='stopped', step=2, executed={'centring': 1, 'head': 1})"
    )
    workplace.shutting_down.clear()
    work(BEFORE_ANY_ROW)
    assert (job().status, job().executed) == ("failed", {"centring": 1, "head": 1})
    assert 0.0 < reservation().rho_charged < reservation().rho


def test_a_failure_before_any_row_is_charged_in_full_behind_a_crash(work: Work, job: Read, reservation: Any) -> None:
    work("started(); progress({'centring': 1}); time.sleep(0.3); os.kill(os.getpid(), 9)")
    work(BEFORE_ANY_ROW)
    assert job().status == "failed"
    assert charged_in_full(reservation())


def test_a_crash_is_known_to_have_come_as_far_as_its_trainer_said(
    work: Work, job: Read, workplace: Workplace, reservation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two heartbeats, too: a checkpoint before that step does not make up for what made it crash."""
    monkeypatch.setattr(workplace.settings, "heartbeat_seconds", 60.0)
    work("started(); progress({'centring': 1, 'head': 3}); os.kill(os.getpid(), 9)")
    assert job().progress["crashed_at"] >= 4  # type: ignore[index]
    behind = "{'centring': 1, 'head': 1}"
    stopped = f"started(); checkpoint({behind}); wait_for_stop(); say(type='stopped', step=2, executed={behind})"
    worker = threading.Thread(target=work, args=(stopped,))
    worker.start()
    until(lambda: job().checkpoint)
    workplace.shutting_down.set()
    worker.join()
    workplace.shutting_down.clear()
    assert job().interrupted
    work(BEFORE_ANY_ROW)
    assert job().status == "failed"
    assert charged_in_full(reservation())


@pytest.mark.parametrize(
    ("script", "read"),
    [
        ("started(); os.kill(os.getpid(), 9)", True),
        ("ready(); control.sendall(b'hello\\n')", True),
        ("ready(); raise SystemExit(1)", True),
        ("os.kill(os.getpid(), 9)", False),
        ("control.sendall(b'hello\\n')", False),
        ("raise SystemExit(1)", False),
    ],
    ids=["killed", "no-message", "before-it-started", "killed-before", "no-message-before", "before-any-row"],
)
def test_a_crash_gives_the_job_back_until_the_attempts_are_used_up(
    work: Work, job: Read, reservation: Any, script: str, read: bool
) -> None:
    """A trainer that had no row yet was killed for nothing that is in one: memory for the model alone, for instance."""
    for attempt in (1, 2):
        work(script)
        assert (job().status, job().attempts) == ("queued", attempt)
        assert reservation().state == "reserved"
    work(script)
    assert (job().status, job().attempts) == ("failed", 3)
    assert charged_in_full(reservation()) if read else charged_nothing(reservation())


@pytest.mark.parametrize(
    "script",
    [
        "started(); stands({'head': 10**6}); time.sleep(60)",
        "started(); stands({'Mrs Patient': 1}); time.sleep(60)",
        "started(); say(type='progress', step=1, num_steps=total, phase='Mrs Patient', executed={'head': 1});"
        "time.sleep(60)",
        "started(); say(type='progress', step=7, num_steps=total, phase='head', executed={'head': 1}); time.sleep(60)",
        "started(); say(type='checkpoint', step='../../data', executed={'head': 1}); time.sleep(60)",
        "started(); allowed = 10**9; checkpoint({'head': 10**6}); time.sleep(60)",
    ],
    ids=["too-many-steps", "another-part", "another-phase", "another-sum", "step-is-a-path", "checkpoint-too-far"],
)
def test_counts_that_are_not_of_the_plan_end_the_attempt_and_reach_no_row(
    work: Work, job: Read, client: TestClient, script: str
) -> None:
    work(script)
    assert (job().status, job().attempts) == ("queued", 1)
    assert (job().progress or {}).get("executed") is None
    assert job().checkpoint is None
    answer = client.get(f"/v1/fine_tuning/jobs/{job().id}")
    assert answer.status_code == 200
    assert "Patient" not in answer.text


def test_rows_that_were_deleted_fail_the_job(work: Work, job: Read, database: Database, reservation: Any) -> None:
    with database.writing() as session:
        session.execute(update(File).values(deleted_at=1.0))
    work(SUCCESS)
    assert (job().status, job().error["code"]) == ("failed", "data_mismatch")  # type: ignore[index]
    assert charged_nothing(reservation())


def test_a_checkpoint_that_was_damaged_in_the_store_is_not_resumed(
    work: Work, job: Read, workplace: Workplace, reservation: Any
) -> None:
    work("started(); checkpoint({'centring': 1}); time.sleep(0.5); os.kill(os.getpid(), 9)")
    checkpoint = job().checkpoint
    assert checkpoint is not None
    workplace.storage.put_bytes(f"{checkpoint['key']}/state.json", b"something else")
    work(SUCCESS)
    assert (job().status, job().error["code"]) == ("failed", "resume_mismatch")  # type: ignore[index]
    assert charged_in_full(reservation())


def test_rows_that_are_not_those_of_the_plan_are_not_read(
    work: Work, job: Read, workplace: Workplace, database: Database
) -> None:
    with database.reading() as session:
        file = session.get_one(File, job().training_file_id)
    assert file.rows_key is not None
    workplace.storage.put_bytes(file.rows_key, b"other rows")
    work(SUCCESS)
    assert (job().status, job().error["code"]) == ("failed", "data_mismatch")  # type: ignore[index]


def test_a_job_whose_key_does_not_open_makes_no_step(work: Work, job: Read, database: Database) -> None:
    with database.writing() as session:
        session.execute(update(JobKey).values(wrapped=b"x" * 60))
    work(SUCCESS)
    assert (job().status, job().error["code"]) == ("failed", "job_key_unavailable")  # type: ignore[index]


def test_a_cancel_is_answered_with_the_executed_steps_and_they_alone_are_charged(
    work: Work, job: Read, once_started: Any, client: TestClient, reservation: Any
) -> None:
    once_started(lambda: client.post(f"/v1/fine_tuning/jobs/{job().id}/cancel"))
    work(CANCELLED_AFTER_THREE)
    assert job().status == "cancelled"
    assert job().executed == {"centring": 1, "head": 2}
    assert reservation().state == "settled"
    assert 0.0 < reservation().rho_charged < reservation().rho


def test_a_cancel_before_the_trainer_started_costs_nothing(
    work: Work, job: Read, client: TestClient, reservation: Any
) -> None:
    asked = threading.Timer(0.3, lambda: client.post(f"/v1/fine_tuning/jobs/{job().id}/cancel"))
    asked.start()
    work("time.sleep(60)")
    asked.join()
    assert job().status == "cancelled"
    assert (reservation().state, reservation().rho_charged) == ("settled", 0.0)


def test_a_cancel_that_the_trainer_does_not_answer_is_charged_in_full(
    work: Work, job: Read, once_started: Any, client: TestClient, reservation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "CANCEL_SECONDS", 0.3)
    once_started(lambda: client.post(f"/v1/fine_tuning/jobs/{job().id}/cancel"))
    work("started(); time.sleep(60)")
    assert job().status == "cancelled"
    assert charged_in_full(reservation())


def test_a_worker_that_shuts_down_keeps_the_last_checkpoint_and_gives_the_attempt_back(
    work: Work, job: Read, once_started: Any, workplace: Workplace, reservation: Any
) -> None:
    once_started(workplace.shutting_down.set)
    work(
        "started(); progress({'centring': 1}); wait_for_stop(); checkpoint({'centring': 1, 'head': 1});"
        "say(type='stopped', step=2, executed={'centring': 1, 'head': 1})"
    )
    assert (job().status, job().attempts) == ("queued", 0)
    assert job().checkpoint["step"] == 2  # type: ignore[index]
    assert reservation().state == "reserved"
    assert work(SUCCESS).taken == []  # it takes no other job
    workplace.shutting_down.clear()
    work(SUCCESS)
    assert job().status == "succeeded"


def test_a_job_that_another_took_over_is_left_alone(
    work: Work, job: Read, once_started: Any, database: Database, reservation: Any, stored: Any
) -> None:
    def take_over() -> None:
        with database.writing() as session:
            session.execute(update(Job).values(fence=Job.fence + 1, worker="another"))

    once_started(take_over)
    spares = work("started(); progress({'head': 1}); time.sleep(60)")
    assert spares.taken[0].process.returncode == -9
    assert (job().status, job().worker) == ("running", "another")
    assert reservation().state == "reserved"


def test_a_settlement_that_fails_leaves_the_job_to_the_sweep(
    work: Work, job: Read, workplace: Workplace, reservation: Any, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any) -> None:
        raise OperationalError("COMMIT", {}, OSError("connection lost"))

    with monkeypatch.context() as patch:
        patch.setattr(settlement.budgets, "settle", unreachable)
        work(SUCCESS)
    assert (job().status, job().fine_tuned_model) == ("running", None)
    assert reservation().state == "reserved"
    with database.writing() as session:
        session.execute(update(Job).values(lease_expires_at=0.0))
    with database.writing() as session:
        assert lifecycle.sweep(session, workplace.settings) == [job().id]
    work(SUCCESS)
    assert job().status == "succeeded"
    assert charged_in_full(reservation())


def test_a_store_that_does_not_answer_costs_an_attempt_not_the_job(
    work: Work, job: Read, workplace: Workplace, reservation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(workplace.storage), "put_file", refuse)
        work(SUCCESS)
    assert (job().status, job().attempts) == ("queued", 1)
    assert reservation().state == "reserved"
    work(SUCCESS)
    assert job().status == "succeeded"


@pytest.mark.parametrize(("script", "read"), [("started(); time.sleep(60)", True), ("time.sleep(60)", False)])
def test_a_job_that_takes_too_long_fails(
    work: Work, job: Read, workplace: Workplace, reservation: Any, script: str, read: bool
) -> None:
    object.__setattr__(workplace.settings, "max_job_seconds", 2.0)
    work(script)
    assert (job().status, job().error["code"]) == ("failed", "time_limit")  # type: ignore[index]
    assert charged_in_full(reservation()) if read else charged_nothing(reservation())
