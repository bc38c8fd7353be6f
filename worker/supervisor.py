"""One job from claim to settlement: lays out the job folder, follows the trainer, keeps the lease, settles.

The trainer's word is never taken for more than it is: executed steps are checked against the plan and against what it
was allowed, rows against their digest, messages against the release gate. That it has read no row is known from its
having been given none. Whatever happens here, the database's guarded writes decide.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import structlog
from obstore.exceptions import BaseError as StoreError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.budgets import heads
from app.exports import lifecycle as exports
from app.jobs import lifecycle
from app.jobs.keys import KeyUnavailable
from app.jobs.lifecycle import Claimed, LeaseLost
from worker import layout, leftovers, reporter
from worker.allowance import Allowance, Until
from worker.attempt_store import AttemptStore
from worker.layout import NotBegun, Unworkable
from worker.lease import Lease
from worker.spares import Spares
from worker.trainer.messages import (
    FAILURES,
    Allowed,
    Checkpoint,
    Failed,
    Finished,
    Message,
    Notice,
    Progress,
    Ready,
    Rows,
    Started,
    Stopped,
    Truncation,
)
from worker.trainer.spec import RuntimeOptions
from worker.trainer_process import BadMessage, TrainerGone, TrainerProcess
from worker.workplace import Workplace

log = structlog.get_logger(__name__)

#: How long a trainer that was asked to stop may take for the step at hand before it is killed: for a cancelled job,
#: which is then charged in full, and for a worker that shuts down, whose job resumes from its last checkpoint.
CANCEL_SECONDS = 60.0
SHUTDOWN_SECONDS = 15.0
_LOOK = 0.2

#: An out-of-memory halves the physical batch, down to this many tokens.
_SMALLEST_BATCH_TOKENS = 64


class _AttemptEnded(Exception):
    """The job went back to the queue, or ended otherwise than by success; the database knows."""


def run_job(workplace: Workplace, spares: Spares, job_id: str) -> None:
    """Claims the job and works on it until it is settled, given back or lost. A stale hint does nothing."""
    if workplace.shutting_down.is_set() or not heads.may_start(workplace.database, job_id):
        return
    with workplace.database.writing() as session:
        claimed = lifecycle.claim(session, job_id, workplace.name, workplace.settings.lease_seconds)
    if claimed is None:
        return
    with structlog.contextvars.bound_contextvars(job_id=job_id, fence=claimed.fence):
        try:
            with _lease(workplace, claimed) as lease:
                Attempt(workplace, claimed, lease, spares.take()).run()
        except LeaseLost:
            log.warning("job_lost")
        except (SQLAlchemyError, OSError):
            log.exception("job_left_to_the_sweep")
        finally:
            spares.prepare()


def _lease(workplace: Workplace, claimed: Claimed) -> Lease:
    seconds = workplace.settings.lease_seconds

    def heartbeat(session: Session, progress: Mapping[str, Any] | None) -> bool:
        return lifecycle.heartbeat(session, claimed.job_id, claimed.fence, seconds, progress).cancel_requested

    return Lease(workplace.database, heartbeat, workplace.settings, cancel_requested=claimed.cancel_requested)


class Attempt:
    """One execution of a job by one trainer process."""

    def __init__(self, workplace: Workplace, claimed: Claimed, lease: Lease, trainer: TrainerProcess) -> None:
        self._workplace = workplace
        self._settings = workplace.settings
        self._claimed = claimed
        self._lease = lease
        self._trainer = trainer
        self._folder = trainer.folder.path
        self._progress = reporter.ProgressEvents()
        self._allowance = Allowance(claimed)
        self._reached: int | None = None  # the step to which the trainer has come, once it began to make steps
        self._until: Until | None = None  # what it is to be allowed, until that is written down
        self._allowed = (claimed.checkpoint or {}).get("step", 0)  # the step to which it may have come, as written down
        self._ready = self._rows_given = self._may_step = False
        self._runtime = RuntimeOptions(
            device=self._settings.device,
            precision=self._settings.precision,
            max_physical_batch_tokens=self._settings.max_physical_batch_tokens,
            threads=self._settings.threads,
            ranks=self._settings.ranks,
        )
        self._deadline = time.monotonic() + self._settings.max_job_seconds

    def run(self) -> None:
        """Returns once the job is settled or given back. Raises LeaseLost; removes trainer and folder in any case."""
        try:
            try:
                self._work()
            except Unworkable as reason:
                self._trainer.kill()
                self._fail(str(reason), rows_read=not isinstance(reason, NotBegun))
            except (OSError, StoreError):
                # The disk is full, the store does not answer: not the job's fault, but it cannot go on here either.
                log.exception("storage_failed")
                self._trainer.kill()
                self._abandon("storage_error")
        except _AttemptEnded:
            pass
        finally:
            self._trainer.close()

    def _work(self) -> None:
        spec = layout.lay_out(self._workplace, self._claimed, self._folder, self._freeze())
        self._store = AttemptStore(self._workplace, self._claimed, self._folder, spec)
        key = self._key()
        log.info("trainer_begins", attempt=self._claimed.attempt, pid=self._trainer.process.pid)
        self._trainer.begin(key)
        finished = self._follow()
        self._publish(finished)

    # Before the trainer starts

    def _freeze(self) -> RuntimeOptions:
        with self._workplace.database.writing() as session:
            wanted = dataclasses.asdict(self._runtime)
            frozen = lifecycle.freeze_runtime(session, self._claimed.job_id, self._claimed.fence, wanted)
        self._runtime = RuntimeOptions(**frozen)
        return self._runtime

    def _freeze_what_runs(self, started: Started) -> None:
        """`auto` and 0 were this machine's to choose: what it chose holds for every later attempt, and is reported."""
        ran = dataclasses.replace(
            self._runtime,
            max_physical_batch_tokens=started.max_physical_batch_tokens,
            device=started.device,
            threads=started.threads,
            ranks=started.ranks,
        )
        if ran != self._runtime:
            claimed, self._runtime = self._claimed, ran
            with self._workplace.database.writing() as session:
                lifecycle.freeze_runtime(session, claimed.job_id, claimed.fence, dataclasses.asdict(ran), replace=True)

    def _key(self) -> bytes:
        with self._workplace.database.reading() as session:
            try:
                return lifecycle.job_key(session, self._claimed.job_id, self._workplace.secret_key)
            except KeyUnavailable:
                raise NotBegun("job_key_unavailable") from None

    # While it runs

    def _follow(self) -> Finished:
        """Relays messages until the trainer has finished; anything else that ends it ends the attempt."""
        while True:
            self._interrupt_where_due()
            self._give_rows()
            self._allow()
            try:
                for message in self._read():
                    if self._relay(message):
                        assert isinstance(message, Finished)
                        return message
            except BadMessage:
                log.error("trainer_protocol_error")
                self._trainer.kill()
                self._abandon("trainer_error")
            except TrainerGone:
                self._crashed()

    def _read(self) -> Iterator[Message]:
        """The next messages, each checked against the plan. Raises TrainerGone and BadMessage."""
        for message in self._trainer.read(_LOOK):
            try:
                reporter.check(message, self._claimed.plan)
            except reporter.NotOfThePlan as error:
                raise BadMessage("not a message of this plan") from error
            if not (self._rows_given or isinstance(message, Ready | Notice | Failed | Stopped)):
                raise BadMessage("not a message of one that has no rows")
            self._require_allowed(message)
            yield message

    def _require_allowed(self, message: Message) -> None:
        """Raises Unworkable where steps were made that the database does not know of: then the job is charged in full,
        for no later checkpoint would be known to pass them all."""
        match message:
            case Progress(step=step) | Checkpoint(step=step) | Stopped(step=step):
                ahead = step > self._allowed
            case Finished(executed):
                ahead = sum(executed.values()) > self._allowed
            case _:
                ahead = False
        if ahead:
            log.error("trainer_went_beyond_its_allowance")
            raise Unworkable("trainer_error")

    def _interrupt_where_due(self) -> None:
        if self._lease.lost.is_set():
            raise LeaseLost(self._claimed.job_id)
        if self._workplace.shutting_down.is_set():
            self._requeue()
        if self._lease.cancel_requested.is_set():
            self._cancel()
        if time.monotonic() > self._deadline:
            raise self._ended_by("time_limit")

    def _ended_by(self, code: str) -> Unworkable:
        return Unworkable(code) if self._rows_given else NotBegun(code)

    def _relay(self, message: Message) -> bool:
        """Passes one message on; whether it was the last."""
        match message:
            case Ready() if not self._ready:
                self._ready = True
            case Started():
                self._freeze_what_runs(message)
                self._record("trainer_started", dataclasses.asdict(message))
                self._reached = (self._claimed.checkpoint or {}).get("step", 0)
            case Notice(code, data):
                self._record(code, data)
            case Truncation():
                self._store.keep_truncation(message)
            case Progress():
                self._lease.note(reporter.progress(message))
                self._reached = message.step
                if self._progress.due(message):
                    self._record("progress", reporter.progress(message))
            case Checkpoint():
                self._store.commit_checkpoint(message, self._runtime)
            case Finished():
                return True
            case Failed(code):
                self._trainer_failed(code)
            case _:  # nobody asked
                raise Unworkable("trainer_error")
        return False

    def _give_rows(self) -> None:
        """Hands the rows over, once it is written down that the trainer may have read them."""
        if self._rows_given or not self._ready:
            return
        claimed, seconds = self._claimed, self._settings.lease_seconds
        try:
            with self._workplace.database.writing() as session:
                lifecycle.give_rows(session, claimed.job_id, claimed.fence, seconds)
        except SQLAlchemyError:
            # As in `_allow`.
            log.warning("rows_not_given", exc_info=True)
        else:
            self._rows_given = True
            layout.give_rows(self._folder)
            self._trainer.tell(Rows())

    def _allow(self) -> None:
        """Lets the trainer go on, once it is written down how far it may have come then."""
        if self._reached is not None:
            self._until = self._allowance.after(self._reached) or self._until
        if self._until is None:
            return
        claimed, seconds = self._claimed, self._settings.lease_seconds
        try:
            with self._workplace.database.writing() as session:
                lifecycle.allow(session, claimed.job_id, claimed.fence, seconds, self._until.noted)
        except SQLAlchemyError:
            # The trainer waits, and so do we: as long as the lease lasts.
            log.warning("allowance_not_written", exc_info=True)
        else:
            self._allowed, self._may_step = self._until.noted, True
            self._trainer.tell(Allowed(self._until.told))
            self._until = None

    def _record(self, code: str, data: Mapping[str, Any]) -> None:
        with self._workplace.database.writing() as session:
            lifecycle.heartbeat(session, self._claimed.job_id, self._claimed.fence, self._settings.lease_seconds)
            reporter.record(session, self._claimed, code, data)

    # How it ends

    def _publish(self, finished: Finished) -> None:
        """Stores the bundle, then publishes and settles in one transaction."""
        fields = self._store.store_model(finished, self._runtime)
        self._lease.end()
        model_id = self._store.publish(finished, fields)
        log.info("job_succeeded", model_id=model_id)
        with self._workplace.database.reading() as session:
            waiting = exports.waiting(session, model_id)
        for export_id in waiting:
            self._workplace.queue.hint_export(export_id)
        leftovers.delete_attempts(self._workplace.storage, self._claimed)

    def _cancel(self) -> NoReturn:
        executed = self._stop(CANCEL_SECONDS)
        if executed is None and not self._may_step:
            executed = {}
        self._lease.end()
        with self._workplace.database.writing() as session:
            if executed is None:
                lifecycle.abandon(session, self._claimed.job_id, self._claimed.fence, self._settings, "trainer_error")
            else:
                lifecycle.cancel_running(session, self._claimed.job_id, self._claimed.fence, executed)
        log.info("job_cancelled", executed_known=executed is not None)
        leftovers.delete_attempts(self._workplace.storage, self._claimed)
        raise _AttemptEnded

    def _requeue(self) -> NoReturn:
        """This worker shuts down: the next one resumes from the checkpoint with which the trainer answers Stop."""
        executed = self._stop(SHUTDOWN_SECONDS, commit=True)
        if executed is None and not self._may_step:
            executed = {}
        self._lease.end()
        with self._workplace.database.writing() as session:
            lifecycle.requeue(session, self._claimed.job_id, self._claimed.fence, executed)
        log.info("job_requeued")
        raise _AttemptEnded

    def _stop(self, seconds: float, *, commit: bool = False) -> Mapping[str, int] | None:
        """Asks the trainer to stop; what it had executed, or None where it did not say so in time. It is gone then."""
        deadline = time.monotonic() + seconds
        if self._may_step:
            self._trainer.stop()
        else:  # nothing to wait for; one that is asked to stop would make the step at hand, which nobody wrote down
            self._trainer.kill()
        try:
            while time.monotonic() < deadline:
                for message in self._read():
                    match message:
                        case Stopped(_, executed) | Finished(executed):
                            return executed
                        case Checkpoint() if commit:
                            self._store.commit_checkpoint(message, self._runtime)
                        case _:
                            pass
                if self._lease.lost.is_set():
                    raise LeaseLost(self._claimed.job_id)
        except TrainerGone:
            pass
        except BadMessage:
            self._may_step = self._rows_given  # nothing is known of one that does not obey
        finally:
            self._trainer.kill()
        return None

    def _trainer_failed(self, code: str) -> NoReturn:
        """A failure that the trainer told. Only an out-of-memory is tried again, with half of the physical batch."""
        code = code if code in FAILURES else "trainer_error"  # it is logged: never a text of the trainer's own
        log.warning("trainer_failed", code=code, **self._trainer.where_it_failed())
        tokens = self._runtime.max_physical_batch_tokens // 2
        if code != "out_of_memory" or tokens < _SMALLEST_BATCH_TOKENS:
            raise self._ended_by(code)
        claimed, smaller = self._claimed, dataclasses.replace(self._runtime, max_physical_batch_tokens=tokens)
        with self._workplace.database.writing() as session:
            lifecycle.freeze_runtime(session, claimed.job_id, claimed.fence, dataclasses.asdict(smaller), replace=True)
            reporter.record(session, claimed, "batch_size_reduced", {"max_physical_batch_tokens": tokens})
        self._abandon(code)

    def _crashed(self) -> NoReturn:
        if self._lease.lost.is_set():
            raise LeaseLost(self._claimed.job_id)
        log.warning("trainer_crashed", status=self._trainer.status(), **self._trainer.where_it_failed())
        self._abandon("trainer_error")

    def _abandon(self, code: str) -> NoReturn:
        """The attempt is lost, not the job: the next claim resumes it, as long as attempts are left."""
        self._lease.end()
        claimed, seconds = self._claimed, self._settings.lease_seconds
        with self._workplace.database.writing() as session:
            # How far it is known to have come: the next beat would have told.
            lifecycle.heartbeat(session, claimed.job_id, claimed.fence, seconds, self._lease.progress)
            queued = lifecycle.abandon(
                session, claimed.job_id, claimed.fence, self._settings, code, rows_read=self._rows_given
            )
        if queued:
            self._workplace.queue.hint_job(self._claimed.job_id)
        else:
            leftovers.delete_attempts(self._workplace.storage, self._claimed)
        raise _AttemptEnded

    def _fail(self, code: str, *, rows_read: bool) -> None:
        self._lease.end()
        with self._workplace.database.writing() as session:
            lifecycle.fail(session, self._claimed.job_id, self._claimed.fence, code, rows_read=rows_read)
        log.warning("job_failed", code=code, rows_read=rows_read)
        leftovers.delete_attempts(self._workplace.storage, self._claimed)
