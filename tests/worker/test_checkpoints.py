"""Checkpoints on the way: published with the pointer that moves to them, kept whatever happens, in the ledger."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from app.budgets.tables import Reservation
from app.db.session import Database
from app.jobs import lifecycle
from app.jobs.tables import Job
from app.privacy.report_check import check_report
from app.settings import Settings
from tests.running import until
from tests.worker.conftest import submit
from tests.worker.test_restored_database import transfer
from worker import chores
from worker.workplace import Workplace

Work = Callable[..., Any]
Read = Callable[[], Job]

#: take(n): the checkpoint behind the n-th of the job's published steps, with its bundle, as a trainer leaves both.
TAKE = """
def executed(step):
    return {"centring": 1, "head": step - 1}
def bundle(root, words):
    for name in ("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        os.makedirs(root + "/results/model", exist_ok=True)
        open(root + "/results/model/" + name, "w").write(words + name)
    open(root + "/results/metrics.json", "w").write('{"released": "none"}')
def take(number, words="taken"):
    step = spec["published_steps"][number]
    bundle(os.path.join(folder, "taken", str(step)), words)
    checkpoint(executed(step))
started()
"""


@pytest.fixture
def submitted(client: TestClient, workplace: Workplace) -> str:
    """The id of a queued job that is to publish two checkpoints."""
    return submit(client, workplace, checkpoints={"count": 2})


@pytest.fixture
def listed(client: TestClient, submitted: str) -> Callable[[], list[dict[str, Any]]]:
    """The job's checkpoints, as the wire lists them."""
    return lambda: client.get(f"/v1/fine_tuning/jobs/{submitted}/checkpoints").raise_for_status().json()["data"]


def test_a_checkpoint_is_a_model_with_a_report_of_its_steps(
    work: Work, job: Read, client: TestClient, listed: Any
) -> None:
    work(TAKE + "take(0); take(1); bundle(folder, 'final'); finish()")
    assert job().status == "succeeded"
    assert job().resolved is not None
    steps = job().resolved["checkpoint_steps"]
    found = listed()
    whole = sum(job().executed.values())  # type: ignore[union-attr]
    assert [checkpoint["step_number"] for checkpoint in found] == [whole, *reversed(steps)]
    assert found[0]["fine_tuned_model_checkpoint"] == job().fine_tuned_model
    costs = [checkpoint["epsilon_spent"] for checkpoint in found]
    assert costs == sorted(costs, reverse=True)
    assert 0.0 < costs[-1] < costs[0] <= 1.0

    for checkpoint in found[1:]:
        name, step = checkpoint["fine_tuned_model_checkpoint"], checkpoint["step_number"]
        model = client.get(f"/v1/models/{name}").json()
        assert (model["step_number"], model["job"]) == (step, job().id)
        assert model["metrics"]["released"] == "none"
        report = client.get(f"/v1/models/{name}/files/privacy_report.json").json()
        assert report == model["privacy_report"]
        assert report["checkpoint"] == {"step_number": step, "num_steps": whole}
        assert report["guarantee"]["epsilon"] == checkpoint["epsilon_spent"]
        assert [check for check in check_report(report) if not check.holds] == []
        assert client.get(f"/v1/models/{name}/files/model.safetensors").text == "takenmodel.safetensors"
        assert client.get(f"/v1/models/{name}/download").status_code == 200
    assert len(client.get("/v1/models").json()["data"]) >= 3

    page = client.get(f"/v1/fine_tuning/jobs/{job().id}/checkpoints", params={"limit": 1}).json()
    assert page["has_more"]
    after = {"limit": 5, "after": page["data"][0]["id"]}
    rest = client.get(f"/v1/fine_tuning/jobs/{job().id}/checkpoints", params=after).json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == ([one["id"] for one in found[1:]], False)


def test_what_a_crash_leaves_before_its_commit_is_never_seen(
    work: Work, job: Read, client: TestClient, listed: Any, monkeypatch: pytest.MonkeyPatch, stored: Any
) -> None:
    commit = lifecycle.commit_checkpoint

    def lost(*_: Any, **__: Any) -> Any:
        raise OSError("the worker dies here")

    monkeypatch.setattr(lifecycle, "commit_checkpoint", lost)
    work(TAKE + "take(0, 'unseen'); wait_for_stop()")
    assert (job().status, job().checkpoint) == ("queued", None)
    assert listed() == []
    assert stored("step-") != []
    monkeypatch.setattr(lifecycle, "commit_checkpoint", commit)
    work(TAKE + "take(0, 'seen'); os.kill(os.getpid(), 9)")
    (checkpoint,) = listed()
    work(TAKE + "take(1); bundle(folder, 'final'); finish()")
    assert job().status == "succeeded"
    content = client.get(f"/v1/models/{checkpoint['fine_tuned_model_checkpoint']}/files/model.safetensors")
    assert content.text == "seenmodel.safetensors"  # another attempt's, kept through the claim and the job's end
    assert len({key.rpartition("/")[0] for key in stored("models/")}) == 3


BEFORE_ANY_ROW = "say(type='failed', code='base_model_invalid')"


@pytest.mark.parametrize("end", ["cancelled", "failed", "failed before any row", "crashed, then failed before any row"])
def test_it_stays_when_the_job_ends_otherwise_and_its_steps_are_charged(
    work: Work, job: Read, client: TestClient, database: Database, workplace: Workplace, listed: Any, end: str
) -> None:
    if end == "failed":
        work(TAKE + "take(0); say(type='failed', code='trainer_error')")
    elif end.startswith("crashed"):
        work(TAKE + "take(0); os.kill(os.getpid(), 9)")
        work(BEFORE_ANY_ROW)
    else:
        # The trainer stops and claims to have executed nothing.
        script = TAKE + "take(0); wait_for_stop(); say(type='stopped', step=0, executed={})"
        worker = threading.Thread(target=work, args=(script,))
        worker.start()
        until(listed)
        if end == "cancelled":
            assert client.post(f"/v1/fine_tuning/jobs/{job().id}/cancel").status_code == 200
        else:
            workplace.shutting_down.set()
        worker.join()
        if end != "cancelled":
            workplace.shutting_down.clear()
            work(BEFORE_ANY_ROW)
    assert job().status == ("cancelled" if end == "cancelled" else "failed")
    (budget,) = client.get("/v1/privacy_budgets").json()["data"]
    assert budget["status"] == "open"
    assert client.get(f"/v1/privacy_budgets/{budget['id']}/audit").json()["intact"]
    (checkpoint,) = listed()
    with database.reading() as session:
        reservation = session.scalars(select(Reservation)).one()
    url = f"/v1/models/{checkpoint['fine_tuned_model_checkpoint']}"
    (budget,) = client.get(url).json()["privacy_report"]["budgets"]
    if end in ("failed", "crashed, then failed before any row"):
        assert reservation.rho_charged == reservation.rho
    else:
        assert reservation.charged_event == budget["dp_event"]
        assert job().executed == {"centring": 1, "head": checkpoint["step_number"] - 1}
    with database.writing() as session:
        session.execute(update(Job).values(finished_at=0.0))
    chores.sweep(workplace)  # what ended jobs left goes; this stays
    assert client.get(f"{url}/download").status_code == 200
    assert client.delete(url).status_code == 200
    assert client.get(url).status_code == 404
    assert listed() == []


def test_the_ledger_takes_note_so_that_a_restored_database_runs_no_published_step_again(
    work: Work, job: Read, client: TestClient, settings: Settings, listed: Any, stored: Any, tmp_path: Path
) -> None:
    live, copy = settings.database.removeprefix("sqlite:///"), str(tmp_path / "backup.db")
    transfer(live, copy)
    work(TAKE + "take(0); os.kill(os.getpid(), 9)")
    (checkpoint,) = listed()
    (budget,) = client.get("/v1/privacy_budgets").json()["data"]
    entries = client.get(f"/v1/privacy_budgets/{budget['id']}/entries").json()["data"]
    (entry,) = [entry for entry in entries if entry["kind"] == "checkpoint_published"]
    model = client.get(f"/v1/models/{checkpoint['fine_tuned_model_checkpoint']}").json()
    assert (entry["job_id"], entry["rho"]) == (job().id, 0.0)
    assert entry["dp_event"] == model["privacy_report"]["budgets"][0]["dp_event"]
    assert entry["details"] == {"step_number": checkpoint["step_number"], "model": model["id"]}
    assert client.get(f"/v1/privacy_budgets/{budget['id']}/audit").json()["intact"]

    transfer(copy, live)
    assert (job().status, job().checkpoint) == ("queued", None)
    assert work(TAKE + "take(0, 'again'); finish()").taken == []
    assert client.get(f"/v1/privacy_budgets/{budget['id']}").json()["status"] == "locked"


def test_a_bundle_that_is_not_whole_is_not_published(work: Work, job: Read, listed: Any) -> None:
    work(TAKE + "checkpoint(executed(spec['published_steps'][0])); wait_for_stop()")
    assert (job().status, job().error["code"]) == ("failed", "trainer_error")  # type: ignore[index]
    assert listed() == []
