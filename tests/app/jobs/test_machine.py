"""Jobs on one budget through every order of events that a state machine finds: what may never be, never is.

Submit, claim, give the rows, step, checkpoint, crash, sweep, graceful stop, cancel, fail, finish, delete; zombies write
between. After each: Σ ρ(charged and reserved) ≤ capacity; Σ ρ(charged) never falls; no step of a committed checkpoint
is unpaid once its job has ended; every ended job has let go of all that it held; the ledger's chain holds and its sums
are the rows'.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import func, select

from app.auth.service import authenticate
from app.bootstrap import bootstrap
from app.budgets import ledger, repository
from app.budgets import service as budgets
from app.budgets.tables import LedgerEntry, PrivacyBudget, Reservation
from app.db.session import Database
from app.errors import BudgetExceeded, Conflict
from app.files import service as files
from app.files.tables import File, FileUse
from app.jobs import lifecycle, service, submission
from app.jobs.lifecycle import Claimed, LeaseLost
from app.jobs.schemas import CreateJob
from app.jobs.settlement import at_least
from app.jobs.tables import TERMINAL, Job, JobKey
from app.privacy.dp_events import event_for, from_json
from app.privacy.plan import PrivacyPlan
from app.queue import Queue
from app.settings import Settings
from tests.app.jobs.conftest import MODEL, SECRET
from tests.app.jobs.test_lifecycle import MODEL_FIELDS, all_steps, progress


class Life(RuleBasedStateMachine):
    """The service's own functions, on a migrated SQLite database; SQLite runs the same statements as PostgreSQL."""

    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="pt-machine-"))
        shutil.copy(self.template, self.folder / "db")
        url = f"sqlite:///{self.folder / 'db'}"
        self.database = Database(url)
        self.settings = Settings(data_dir=self.folder, database_url=url, max_attempts=2)
        self.queue = Queue("redis+socket:///nonexistent/valkey.sock")
        with self.database.writing() as session:
            token = bootstrap(session, self.settings)
        with self.database.writing() as session:
            self.caller = authenticate(session, token or "")
            self.budget_id = budgets.default_for(session, self.caller.project_id).id
        self.files: list[str] = []
        self.jobs: list[str] = []
        self.claims: list[Claimed] = []
        self.done: dict[tuple[str, int], dict[str, int]] = {}
        self.stopped: set[tuple[str, int]] = set()
        self.given: set[tuple[str, int]] = set()
        self.unheard: dict[tuple[str, int], int] = {}
        self.charged = 0.0
        self._file()

    def teardown(self) -> None:
        self.database.dispose()
        shutil.rmtree(self.folder)

    def _file(self) -> None:
        file_id = f"file-{len(self.files)}"
        columns = [{"name": "text", "classes": None}, {"name": "label", "classes": ["a", "b"]}]
        with self.database.writing() as session:
            session.add(
                File(
                    id=file_id,
                    project_id=self.caller.project_id,
                    budget_id=self.budget_id,
                    filename="rows.csv",
                    bytes=1,
                    sha256="a" * 64,
                    purpose="fine-tune",
                    status="processed",
                    public=False,
                    num_rows=2000,
                    rows_digest="b" * 64,
                    columns=columns,
                    source_key="s",
                    created_at=0.0,
                )
            )
        self.files.append(file_id)

    @contextmanager
    def _worker(self, claimed: Claimed) -> Iterator[Any]:
        """A worker's write: it happens exactly where the worker still holds the job."""
        with self.database.reading() as session:
            job = session.get_one(Job, claimed.job_id)
            holds = (job.status, job.fence) == ("running", claimed.fence)
        try:
            with self.database.writing() as session:
                yield session
            assert holds
        except LeaseLost:
            assert not holds

    # --- users

    @initialize()
    def begin(self) -> None:
        for _ in range(2):
            self.submit(2.0)
        self.claim()

    @rule(epsilon=st.sampled_from([0.5, 2.0, 5.0]))
    def submit(self, epsilon: float) -> None:
        body = CreateJob.model_validate(
            {"model": MODEL, "training_file": self.files[-1], "privacy": {"target_epsilon": epsilon}}
        )
        try:
            job = submission.submit(self.database, self.settings, SECRET, self.queue, self.caller, body)
        except BudgetExceeded:
            return
        self.jobs.append(job.id)

    def _cancel(self, job_id: str) -> None:
        try:
            with self.database.writing() as session:
                service.cancel(session, self.caller, job_id)
        except Conflict:
            pass

    @rule()
    def delete_and_upload_again(self) -> None:
        try:
            with self.database.writing() as session:
                files.delete(session, self.caller.project_id, self.files[-1])
        except Conflict:
            return
        self._file()

    # --- workers; `claims` keeps zombies, too

    @rule(steps=st.integers(0, 60))
    def claim(self, steps: int = 0) -> None:
        """The oldest queued job; where steps are made at once, a checkpoint is kept."""
        with self.database.reading() as session:
            queued = session.scalars(select(Job.id).where(Job.status == "queued").order_by(Job.queued_at)).all()
        for job_id in queued[:1]:
            with self.database.writing() as session:
                claimed = lifecycle.claim(session, job_id, "worker", 30.0)
            assert claimed is not None
            assert all(known.fence < claimed.fence for known in self.claims if known.job_id == job_id)
            self.claims.append(claimed)
            self.done[job_id, claimed.fence] = dict((claimed.checkpoint or {}).get("executed", {}))
            if steps:
                self._step(claimed, steps, kept=True)

    @rule(taken_over=st.booleans())
    def crash(self, taken_over: bool) -> None:
        with self.database.writing() as session:
            for job in session.scalars(select(Job).where(Job.status == "running")):
                job.lease_expires_at = 0.0
            session.flush()
            lifecycle.sweep(session, self.settings)
        if taken_over:
            self.claim()

    def _give_rows(self, claimed: Claimed) -> None:
        """Before any step; an attempt that made none may have read them, too."""
        with self._worker(claimed) as session:
            lifecycle.give_rows(session, claimed.job_id, claimed.fence, 30.0)
            self.given.add((claimed.job_id, claimed.fence))

    @rule(data=st.data())
    def give_rows(self, data: st.DataObject) -> None:
        self._give_rows(self._draw(data))

    @rule(data=st.data(), steps=st.integers(1, 120), kept=st.booleans())
    def step(self, data: st.DataObject, steps: int, kept: bool) -> None:
        self._step(self._draw(data), steps, kept)

    def _step(self, claimed: Claimed, steps: int, kept: bool) -> None:
        self._give_rows(claimed)
        executed = self._executed(claimed)
        before = dict(executed)
        executed.update(centring=1, head=min(executed.get("head", 0) + steps, claimed.plan.part("head").num_steps))
        with self._worker(claimed) as session:
            lifecycle.heartbeat(session, claimed.job_id, claimed.fence, 30.0, progress(claimed, **executed))
        if kept and executed != before:
            point = {"key": "k", "step": sum(executed.values()), "executed": dict(executed)}
            with self._worker(claimed) as session:
                lifecycle.commit_checkpoint(session, claimed.job_id, claimed.fence, point)

    @rule(data=st.data(), steps=st.integers(1, 60))
    def step_unheard(self, data: st.DataObject, steps: int) -> None:
        """A trainer makes all the steps that it is allowed, of which its worker hears nothing any more."""
        claimed = self._draw(data)
        self._give_rows(claimed)
        until = min(sum(self._executed(claimed).values()) + steps, sum(all_steps(claimed).values()))
        with self._worker(claimed) as session:
            lifecycle.allow(session, claimed.job_id, claimed.fence, 30.0, until)
            self.unheard[claimed.job_id, claimed.fence] = until

    @rule(data=st.data(), known=st.booleans())
    def stop_gracefully(self, data: st.DataObject, known: bool) -> None:
        claimed = self._draw(data)
        with self._worker(claimed) as session:
            executed = self._executed(claimed) if known else None
            lifecycle.requeue(session, claimed.job_id, claimed.fence, executed)
            if known:
                self.stopped.add((claimed.job_id, claimed.fence))

    @rule(data=st.data(), obeyed=st.sampled_from(["not yet", "honestly", "by one that says too little"]))
    def cancel(self, data: st.DataObject, obeyed: str) -> None:
        job_id = data.draw(st.sampled_from([*self.jobs, *[self.claims[-1].job_id] * len(self.jobs)]))
        self._cancel(job_id)
        for claimed in self.claims if obeyed != "not yet" else ():
            if claimed.job_id == job_id:
                with self._worker(claimed) as session:
                    if lifecycle.heartbeat(session, job_id, claimed.fence, 30.0).cancel_requested:
                        executed = self._executed(claimed) if obeyed == "honestly" else {}
                        lifecycle.cancel_running(session, job_id, claimed.fence, executed)

    @rule(data=st.data(), finished=st.booleans())
    def end(self, data: st.DataObject, finished: bool) -> None:
        claimed = self._draw(data)
        with self._worker(claimed) as session:
            if finished:
                lifecycle.succeed(session, claimed.job_id, claimed.fence, all_steps(claimed), MODEL_FIELDS)
            else:
                lifecycle.fail(session, claimed.job_id, claimed.fence, "trainer_error")

    def _draw(self, data: st.DataObject) -> Claimed:
        """Mostly the latest worker, sometimes a zombie."""
        return data.draw(st.sampled_from([*self.claims, *self.claims[-1:] * 3]))

    def _executed(self, claimed: Claimed) -> dict[str, int]:
        return self.done[claimed.job_id, claimed.fence]

    # --- what may never be

    @invariant()
    def the_budget_is_never_overdrawn_and_forgets_nothing(self) -> None:
        with self.database.reading() as session:
            budget = session.get_one(PrivacyBudget, self.budget_id)
            used = repository.usage(session, self.budget_id)
            assert used.total <= budget.rho_capacity
            assert used.charged >= self.charged
            self.charged = used.charged
            entries = session.scalars(repository.entries(self.budget_id).order_by(LedgerEntry.sequence)).all()
            assert ledger.first_broken(entries, budget) is None
            sums = {kind: sum(e.rho for e in entries if e.kind == kind) for kind in ("reserved", "charged", "released")}
            assert sums["charged"] == used.charged
            assert sums["reserved"] - sums["charged"] - sums["released"] == used.reserved

    @invariant()
    def an_ended_job_has_paid_and_let_go(self) -> None:
        with self.database.reading() as session:
            for job in session.scalars(select(Job)):
                reservation = session.scalars(select(Reservation).where(Reservation.job_id == job.id)).one()
                held = [
                    session.get(JobKey, job.id),
                    session.scalars(select(FileUse).where(FileUse.job_id == job.id)).first(),
                ]
                if job.status not in TERMINAL:
                    assert reservation.state == "reserved"
                    assert None not in held
                    continue
                assert (reservation.state, held) == ("settled", [None, None])
                plan, executed = PrivacyPlan.from_dict(job.plan or {}), job.executed or {}
                event = event_for(plan if job.interrupted else plan.executed(executed))
                assert from_json(reservation.charged_event or {}) == event
                kept = (job.checkpoint or {}).get("executed", {})
                assert executed == at_least(executed, kept)
                for (job_id, fence), step in self.unheard.items():
                    # Of the last attempt it is its worker's word that counts, if it came to say it.
                    if job_id == job.id and fence < job.fence and (job_id, fence) not in self.stopped:
                        assert job.interrupted or sum(executed.values()) >= step
                if job.status == "failed" and not job.interrupted:
                    assert (job.id, job.fence) not in self.given
                if job.status == "succeeded":
                    assert executed == all_steps(job)

    @invariant()
    def a_job_has_one_end(self) -> None:
        from app.events.tables import JobEvent

        with self.database.reading() as session:
            ends = session.execute(
                select(JobEvent.job_id, func.count())
                .where(JobEvent.code.in_([f"job_{status}" for status in TERMINAL]))
                .group_by(JobEvent.job_id)
            ).all()
            assert all(count == 1 for _, count in ends)


@pytest.mark.timeout(300)
def test_every_order_of_events(_sqlite_template: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: PT019
    for name in ("DATABASE_URL", "REDIS_URL", "STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)
    Life.template = _sqlite_template
    run_state_machine_as_test(
        Life,
        settings=hypothesis_settings(
            max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
