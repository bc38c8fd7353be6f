"""A worker's own processes, with real rows, budgets and stores; its trainer is a script where a test says so."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.budgets.tables import Reservation
from app.db.session import Database
from app.jobs.tables import Job
from app.settings import Settings
from app.storage import open_storage
from tests.worker.test_trainer_process import OPENING
from worker import chores, job_folder, supervisor
from worker.trainer_process import TrainerProcess
from worker.workplace import Workplace

Work = Callable[..., Any]
Read = Callable[[], Job]

SUCCESS = "started(); progress({'head': 1}); results(); finish()"

#: What scripts may call: the whole plan as executed steps, a checkpoint, results as a trainer leaves them. They obey:
#: no row before `ready`, no step before it is allowed.
TOOLS = (
    OPENING
    + """
folder = order["folder"]
spec = json.load(open(os.path.join(folder, "spec.json")))
whole = {part["name"]: part.get("num_steps", 1) for part in spec["plan"]["parts"]}
total = sum(whole.values())
lines, allowed, has_rows, stopping = control.makefile(), 0, False, False
def hear():
    global allowed, has_rows, stopping
    heard = json.loads(lines.readline())
    allowed, has_rows = max(allowed, heard.get("step", 0)), has_rows or heard["type"] == "rows"
    stopping = stopping or heard["type"] == "stop"
    return heard["type"]
def ready():
    say(type="ready")
    while not has_rows:
        hear()
def started():
    if not has_rows:
        ready()
    say(type="started", device="cpu", trainable_parameters=1, total_parameters=2,
        max_physical_batch_tokens=spec["runtime"]["max_physical_batch_tokens"], threads=1, ranks=2)
def await_allowed(executed):
    step = sum(executed.values())
    while allowed < step and not stopping:  # the step at hand is made
        if allowed:
            tell(allowed, executed)
        hear()
def tell(step, executed):
    done, left = {}, step
    for name, count in executed.items():
        done[name], left = min(count, left), left - min(count, left)
    stands(done)
def progress(executed):
    await_allowed(executed)
    stands(executed)
def stands(executed):
    say(type="progress", step=sum(executed.values()), num_steps=total, phase=list(executed)[-1], executed=executed)
def checkpoint(executed, losses=()):
    await_allowed(executed)
    step = sum(executed.values())
    path = os.path.join(folder, "checkpoints", str(step))
    os.makedirs(path)
    open(os.path.join(path, "state.json"), "w").write(json.dumps(executed))
    say(type="checkpoint", step=step, executed=executed, losses=list(losses))
def point(step, train_loss):
    return {"phase": "head", "step": step, "train_loss": train_loss, "train_loss_noise_std": 9.0}
def wait_for_stop():
    while hear() != "stop":
        pass
def write(name, text):
    path = os.path.join(folder, "results", name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "w").write(text)
def results(metrics=None):
    for name in ("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        write("model/" + name, name)
    write("metrics.json", json.dumps(metrics or {"released": "none"}))
def finish(executed=None):
    await_allowed(executed or whole)
    say(type="finished", executed=executed or whole, train_seconds=1.0)
"""
)


class Scripted:
    """Stands for the spares: every attempt gets the next script, the last one again and again."""

    def __init__(self, root: Path, scripts: tuple[str, ...]) -> None:
        self._root = root
        self._scripts = list(scripts)
        self.taken: list[TrainerProcess] = []

    def take(self) -> TrainerProcess:
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        self.taken.append(TrainerProcess(self._root, program=[sys.executable, "-c", TOOLS + script]))
        return self.taken[-1]

    def prepare(self) -> None: ...


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Impatient."""
    return settings.model_copy(update={"heartbeat_seconds": 0.05, "lease_seconds": 5.0, "budget_epsilon": 60.0})


@pytest.fixture
def workplace(client: TestClient, settings: Settings, database: Database) -> Iterator[Workplace]:
    """Of a worker on the application's own database and store."""
    opened = Workplace.open(settings)
    yield opened
    opened.close()


def submit(client: TestClient, workplace: Workplace, **fields: Any) -> str:
    """The id of a queued job without an evaluation, on 60 rows. fields: further ones of the request."""
    rows = "".join(f"text number {n},{'good' if n % 3 else 'bad'}\n" for n in range(60))
    answer = client.post(
        "/v1/files", files={"file": ("rows.csv", f"text,label\n{rows}".encode())}, data={"purpose": "fine-tune"}
    )
    chores.process_file(workplace, answer.json()["id"])
    job = client.post(
        "/v1/fine_tuning/jobs",
        json={
            "model": "all-MiniLM-L6-v2",
            "training_file": answer.json()["id"],
            "adaptation": {"type": "head"},
            "privacy": {"target_epsilon": 1.0},
            "evaluation": "none",
            **fields,
        },
    )
    assert job.status_code == 200, job.text
    assert job.json()["status"] == "queued"
    return job.json()["id"]


@pytest.fixture
def submitted(client: TestClient, workplace: Workplace) -> str:
    """The id of such a job."""
    return submit(client, workplace)


@pytest.fixture
def work(workplace: Workplace, submitted: str) -> Callable[..., Scripted]:
    """One delivery of the job's hint to a worker whose trainers are these scripts."""

    def deliver(*scripts: str) -> Scripted:
        spares = Scripted(job_folder.folders_root(workplace.settings), scripts)
        supervisor.run_job(workplace, spares, submitted)  # type: ignore[arg-type]
        for trainer in spares.taken:
            assert trainer.process.returncode is not None
            assert not trainer.folder.path.exists()
        return spares

    return deliver


@pytest.fixture
def job(database: Database, submitted: str) -> Callable[[], Job]:
    """The job's row as it is now."""

    def read() -> Job:
        with database.reading() as session:
            return session.get_one(Job, submitted)

    return read


@pytest.fixture
def stored(settings: Settings) -> Callable[[str], list[str]]:
    """Keys in the store whose path holds these words."""
    root = open_storage(settings.storage).local_path("x")
    assert root is not None

    def keys(words: str) -> list[str]:
        files = (path for path in root.parent.rglob("*") if path.is_file())
        return sorted(key for path in files if words in (key := path.relative_to(root.parent).as_posix()))

    return keys


@pytest.fixture
def once_started(database: Database, submitted: str) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Has something done, meanwhile, as soon as it is written down that the job's trainer may make steps."""
    threads: list[threading.Thread] = []

    def ask(action: Callable[[], Any]) -> None:
        def wait() -> None:
            for _ in range(600):
                with database.reading() as session:
                    progress = session.scalars(select(Job.progress).where(Job.id == submitted)).one()
                if (progress or {}).get("allowed"):
                    action()
                    return
                time.sleep(0.05)

        threads.append(threading.Thread(target=wait))
        threads[-1].start()

    yield ask
    for thread in threads:
        thread.join()


@pytest.fixture
def reservation(database: Database, submitted: str) -> Callable[[], Reservation]:
    """What the job holds of its budget."""

    def read() -> Reservation:
        with database.reading() as session:
            return session.scalars(select(Reservation).where(Reservation.job_id == submitted)).one()

    return read


def charged_in_full(reservation: Reservation) -> bool:
    return reservation.state == "settled" and reservation.rho_charged == reservation.rho > 0.0


def charged_nothing(reservation: Reservation) -> bool:
    return (reservation.state, reservation.rho_charged) == ("settled", 0.0)
