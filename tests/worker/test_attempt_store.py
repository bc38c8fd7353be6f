"""What attempts store and commit: bundles, checkpoints, what was cut. Nothing of a stale one stays."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from app.catalog.families import GROUP_NORM_CODE
from app.db.session import Database
from app.files import service as files
from app.files import truncation
from app.jobs import lifecycle
from app.jobs.tables import Job
from app.metadata import metadata
from app.settings import Settings
from tests.worker.test_supervisor import CUT, SUCCESS, Read, Work
from worker import chores
from worker.trainer import families
from worker.trainer_process import TrainerProcess
from worker.workplace import Workplace


def test_what_is_not_on_the_list_stays_in_the_folder(work: Work, job: Read, client: TestClient, stored: Any) -> None:
    work(
        "started(); results(); write('model/trainer_state.json', 'SECRET'); write('model/pytorch_model.bin', 'SECRET');"
        "os.symlink('/etc/hostname', os.path.join(folder, 'results/model/vocab.txt'));"
        "say(type='notice', code='loss_was', data={'loss': 0.123}); finish()"
    )
    assert job().status == "succeeded"
    for words in ("trainer_state", "pytorch_model", "vocab.txt"):
        assert stored(words) == []
    assert "loss" not in client.get(f"/v1/fine_tuning/jobs/{job().id}/events").text


@pytest.mark.parametrize("ours", [True, False])
def test_code_in_a_bundle_is_ours_word_for_word_or_nothing_is_published(
    work: Work, job: Read, client: TestClient, stored: Any, ours: bool
) -> None:
    text = Path(families.__path__[0], GROUP_NORM_CODE).read_text() + ("" if ours else "\n")
    work(f"started(); results(); write('model/{GROUP_NORM_CODE}', {text!r}); finish()")
    if not ours:
        assert job().error == {"code": "trainer_error", "message": "The training process failed.", "param": None}
        assert (job().fine_tuned_model, stored(GROUP_NORM_CODE)) == (None, [])
        return
    shown = client.get(f"/v1/models/{job().fine_tuned_model}/files/{GROUP_NORM_CODE}")
    assert shown.text == text
    assert shown.headers["content-type"].startswith("text/plain")


def test_what_was_cut_is_told_to_the_owner_alone(
    work: Work, job: Read, client: TestClient, stored: Any, database: Database
) -> None:
    work(CUT + "started(); results(); finish()")
    assert job().status == "succeeded"
    file = job().training_file_id
    (told,) = client.get(f"/v1/files/{file}/report").json()["truncation"]
    assert (told["job_id"], told["rows"], told["tokens"]) == (job().id, 60, 987654321)
    assert told["cut"] == {"text": {"rows": 7, "tokens": 77}}
    shown = [client.get(path).text for path in (f"/v1/fine_tuning/jobs/{job().id}", f"/v1/files/{file}", "/v1/models")]
    shown.append(client.get(f"/v1/fine_tuning/jobs/{job().id}/events", params={"limit": 100}).text)
    with database.reading() as session:
        for table in metadata.sorted_tables:
            shown += [json.dumps(list(map(str, row))) for row in session.execute(select(table))]
    assert [text for text in shown if "truncation" in text or "987654321" in text] == []
    assert len(stored("truncation")) == 1
    assert client.delete(f"/v1/files/{file}").status_code == 200
    assert stored("truncation") == []


def _told(client: TestClient, file_id: str) -> list[int]:
    """Tokens of each truncation in the owner's report."""
    return [each["tokens"] for each in client.get(f"/v1/files/{file_id}/report").json()["truncation"]]


def test_what_was_cut_is_stored_while_no_write_waits(
    work: Work, job: Read, workplace: Workplace, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow store may not hold up every writer of the service: the database has one at a time."""
    path = settings.database_url.removeprefix("sqlite:///")  # type: ignore[union-attr]
    put, stored = type(workplace.storage).put_bytes, []

    def look(storage: Any, key: str, *arguments: Any) -> None:
        with contextlib.closing(sqlite3.connect(path, timeout=3.0)) as other:
            other.execute("BEGIN IMMEDIATE")
        stored.append(key)
        put(storage, key, *arguments)

    monkeypatch.setattr(type(workplace.storage), "put_bytes", look)
    work(CUT + "started(); results(); finish()")
    assert job().status == "succeeded"
    assert len([key for key in stored if "/truncation/" in key]) == 1


def test_each_attempt_tells_what_was_cut_and_the_last_counts(
    work: Work, job: Read, client: TestClient, stored: Any
) -> None:
    work(CUT.replace("987654321", "1") + "started(); os.kill(os.getpid(), 9)")
    file = job().training_file_id
    assert _told(client, file) == [1]
    work(CUT.replace("987654321", "2") + "started(); results(); finish()")
    assert _told(client, file) == [2]
    assert len(stored("truncation")) == 1


def test_an_attempt_that_lost_its_job_tells_nothing_of_what_was_cut(
    work: Work, job: Read, client: TestClient, stored: Any, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may find out only when it has stored its figures; they neither stay, nor take another's place."""
    work(CUT.replace("987654321", "1") + "started(); os.kill(os.getpid(), 9)")
    store = truncation.store

    def stolen_meanwhile(*arguments: Any) -> None:
        store(*arguments)
        with database.writing() as session:
            session.execute(update(Job).values(fence=Job.fence + 1))

    monkeypatch.setattr(truncation, "store", stolen_meanwhile)
    work(CUT.replace("987654321", "2") + "time.sleep(60)")
    assert job().status == "running"
    assert _told(client, job().training_file_id) == [1]
    assert len(stored("truncation")) == 1


def test_what_a_killed_worker_stored_of_what_was_cut_is_swept(
    work: Work,
    job: Read,
    client: TestClient,
    stored: Any,
    workplace: Workplace,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work(CUT + "started(); results(); finish()")
    file = job().training_file_id
    figures = {"dataset": "training", "rows": 1, "tokens": 1, "cut": {}}

    def leave(fence: int) -> None:
        truncation.store(workplace.storage, job().project_id, file, job().id, fence, figures)

    leave(job().fence - 1)
    with database.writing() as session:
        session.execute(update(Job).values(finished_at=Job.finished_at - workplace.settings.lease_seconds - 1.0))
    chores.sweep(workplace)
    assert _told(client, file) == [987654321]
    assert len(stored("truncation")) == 1
    # Behind the erasure of the file itself, nobody would look any more.
    assert client.delete(f"/v1/files/{file}").status_code == 200
    leave(job().fence + 1)
    monkeypatch.setattr(files, "_ORPHAN_SECONDS", -1.0)
    assert files.sweep_orphans(database, workplace.storage) == 1
    assert stored(file) == []


@pytest.mark.parametrize(
    "said",
    [
        "dataset='Mrs Patient', rows=1, tokens=1, cut={}",
        "dataset='training', rows=1, tokens=1, cut={'Mrs Patient': {'rows': 1, 'tokens': 1}}",
        "dataset='training', rows=1, tokens=1, cut={'text': {'rows': 1, 'tokens': 'Mrs Patient'}}",
        "dataset='training', rows=1, tokens=1, cut={'text': {'rows': 1, 'tokens': 1, 'Mrs Patient': 1}}",
        "dataset='training', rows=-1, tokens=1, cut={}",
    ],
)
def test_what_was_cut_is_told_in_numbers_only(work: Work, job: Read, stored: Any, said: str) -> None:
    work(f"ready(); say(type='truncation', {said}); started(); results(); finish()")
    assert job().status == "queued"  # as a crash
    assert stored("truncation") == []


def test_the_next_attempt_resumes_from_the_last_committed_checkpoint(work: Work, job: Read, stored: Any) -> None:
    work(
        "started(); checkpoint({'centring': 1}); checkpoint({'centring': 1, 'head': 1});"
        "time.sleep(0.5); os.kill(os.getpid(), 9)"
    )
    checkpoint = job().checkpoint
    assert checkpoint is not None
    assert (checkpoint["step"], checkpoint["executed"]) == (2, {"centring": 1, "head": 1})
    assert stored("checkpoints") == [f"{checkpoint['key']}/state.json"]  # the one before is gone
    work(
        "assert json.load(open(os.path.join(folder, 'resume/state.json'))) == {'centring': 1, 'head': 1};"
        "started(); results(); finish()"
    )
    assert job().status == "succeeded"
    assert stored("checkpoints") == []


def _losses(client: TestClient, job_id: str) -> list[dict[str, Any]]:
    events = client.get(f"/v1/fine_tuning/jobs/{job_id}/events?limit=100").json()["data"]
    return [event["data"] for event in reversed(events) if event["code"] == "train_loss"]


def test_losses_are_told_with_the_checkpoint_that_keeps_their_steps_and_never_again(
    work: Work, job: Read, client: TestClient
) -> None:
    """The second attempt claims other values for steps that were released, as other hardware might compute them."""
    work(
        "started(); checkpoint({'centring': 1, 'head': 45}, [point(21, 1.2), point(41, 1.1)]);"
        "time.sleep(0.5); os.kill(os.getpid(), 9)"
    )
    first = _losses(client, job().id)
    assert [(told["step"], told["train_loss"]) for told in first] == [(21, 1.2), (41, 1.1)]
    for told in first:
        assert told.keys() == {
            "step", "total_steps", "phase", "train_loss", "train_loss_noise_std", "train_loss_interval_95",
        }  # fmt: skip
    work(
        "started(); checkpoint({'centring': 1, 'head': 60}, [point(21, 0.3), point(41, 0.2), point(61, 1.0)]);"
        "checkpoint({'centring': 1, 'head': 160}); results(); finish()"
    )
    assert job().status == "succeeded"
    assert _losses(client, job().id) == [*first, *_losses(client, job().id)[2:]]
    assert [told["step"] for told in _losses(client, job().id)] == [21, 41, 61]


def test_losses_of_a_checkpoint_that_is_not_kept_are_not_told(work: Work, job: Read, client: TestClient) -> None:
    def cancel_first(*arguments: Any, **options: Any) -> Any:
        raise lifecycle.LeaseLost(job().id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle, "commit_checkpoint", cancel_first)
        work("started(); checkpoint({'centring': 1, 'head': 45}, [point(21, 1.2)]); time.sleep(60)")
    assert _losses(client, job().id) == []


@pytest.mark.parametrize(
    "losses",
    [
        "[point(22, 1.2)]",  # no window ends there
        "[point(61, 1.2)]",  # not executed yet
        "[{**point(21, 1.2), 'exact': 0.1}]",
        "[{**point(21, 1.2), 'phase': 'centring'}]",
        "[point(21, 'SECRET')]",
        "[point(21, float('nan'))]",
        "[{**point(21, 1.2), 'train_loss_noise_std': 0.001}]",  # less noise than planned
        "[1.2]",
    ],
)
def test_losses_that_are_not_the_plans_end_the_attempt(work: Work, job: Read, client: TestClient, losses: str) -> None:
    work(f"started(); checkpoint({{'centring': 1, 'head': 45}}, {losses}); time.sleep(60)")
    assert job().status == "queued"
    assert job().checkpoint is None
    events = client.get(f"/v1/fine_tuning/jobs/{job().id}/events").text
    assert "SECRET" not in events
    assert _losses(client, job().id) == []


def test_what_killed_attempts_left_is_gone_before_the_next_one_makes_a_step(
    work: Work, job: Read, workplace: Workplace, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    work("started(); checkpoint({'centring': 1}); time.sleep(0.5); os.kill(os.getpid(), 9)")
    committed = job().checkpoint["key"]  # type: ignore[index]
    attempts, bundles = (f"projects/{job().project_id}/{kind}/{job().id}" for kind in ("jobs", "models"))
    # Killed after the store had them and before the database knew, by this attempt and by one before it.
    for key in (f"{attempts}/{job().fence}/checkpoints/2", f"{attempts}/0/checkpoints/1", f"{bundles}/0"):
        workplace.storage.put_bytes(f"{key}/state.json", b"another copy of the same steps")
    begin, seen = TrainerProcess.begin, []

    def look(trainer: TrainerProcess, key: bytes) -> None:
        seen.extend(stored(job().id))
        begin(trainer, key)

    monkeypatch.setattr(TrainerProcess, "begin", look)
    work(SUCCESS)
    assert seen == [f"{committed}/state.json"]
    assert job().status == "succeeded"


def steal_before(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Another worker claims the job just before that function of `lifecycle` is called."""
    function = getattr(lifecycle, name)

    def stolen_first(session: Any, *arguments: Any) -> Any:
        session.execute(update(Job).values(fence=Job.fence + 1))
        return function(session, *arguments)

    monkeypatch.setattr(lifecycle, name, stolen_first)


def test_a_checkpoint_of_an_attempt_that_lost_its_job_does_not_stay(
    work: Work, job: Read, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steal_before(monkeypatch, "commit_checkpoint")
    work("started(); checkpoint({'centring': 1}); time.sleep(60)")
    assert job().status == "running"
    assert stored("checkpoints") == []


def test_a_lease_lost_just_before_the_end_publishes_nothing(
    work: Work, job: Read, database: Database, client: TestClient, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steal_before(monkeypatch, "succeed")
    work(SUCCESS)
    assert job().status == "running"
    assert job().fine_tuned_model is None
    assert [model for model in client.get("/v1/models").json()["data"] if model["id"].startswith("ft-")] == []
    assert stored("/models/") == []
