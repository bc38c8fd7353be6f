"""The heads of the ledgers, kept beside the artifacts: a database restored from an older backup gives itself away.

After each commit that moved a ledger, its head (sequence, hash, Σρ charged and reserved) goes to the store. Before a
plan is admitted, before a worker claims a job, and in each sweep, the store's head is looked up in the database's
chain. A chain that does not hold it has forgotten what the store's artifacts were made under: the budget locks.

The store is read first, the database after it: what the store names was committed before, so a sound chain holds it. A
crash between a commit and its head leaves the store behind, which is no mismatch; the next check writes it. A worker
checks before each claim, so no step of a job is executed before the store counts its reservation. No lock is held
while the store is asked.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.budgets import ledger, owner, repository, service
from app.budgets.tables import PrivacyBudget
from app.db.session import Database
from app.errors import ServiceUnavailable
from app.storage import Storage

log = structlog.get_logger(__name__)

#: A writer looks again after it wrote, since a slower one may have put an older head over its own. Whoever moves the
#: ledger meanwhile does the same, so there is no need to go on for ever.
_TRIES = 8

#: More than any head has.
_LARGEST = 4096


@dataclass(frozen=True, slots=True)
class Head:
    """Where a chain stands. rho: Σρ charged and reserved there."""

    sequence: int
    hash: str
    rho: float


@dataclass(frozen=True, slots=True)
class Kept:
    """What the store holds. head: None for bytes that are no head, which no chain can know."""

    head: Head | None
    object_sha256: str

    def evidence(self) -> dict[str, Any]:
        """For the ledger."""
        head = self.head
        return {
            "sequence": None if head is None else head.sequence,
            "hash": None if head is None else head.hash,
            "rho": None if head is None else head.rho,
            "object_sha256": self.object_sha256,
        }


def watch(database: Database, storage: Storage) -> None:
    """From now on each commit through `database` that moves a ledger is followed by its head."""
    database.info[ledger.MOVED] = partial(keep, database, storage)


def key(budget_id: str) -> str:
    """Where the store keeps the budget's head."""
    return f"budgets/{budget_id}/head.json"


def keep(database: Database, storage: Storage, budget_id: str) -> bool:
    """Brings the store up to the ledger's head; whether the ledger knows all that the store does.

    Where it does not, the budget locks, and the store's head stays. Raises OSError where the store does not answer.
    """
    for _ in range(_TRIES):
        kept = read(storage, budget_id)
        with database.reading() as session:
            budget = session.get(PrivacyBudget, budget_id)
            if budget is None:
                return True  # its making was rolled back
            if budget.foreign_head is not None:
                return False
            current = Head(budget.next_sequence - 1, budget.head_hash, repository.usage(session, budget_id).total)
            known = kept is None or knows(session, budget_id, kept)
        if not known:
            assert kept is not None
            with database.writing() as session:
                owner.lock_for(session, budget_id, kept.evidence())
            log.error("budget_locked", budget_id=budget_id)
            return False
        if kept is not None and kept.head == current:
            return True
        storage.put_bytes(key(budget_id), _encode(budget_id, current), "application/json")
    return True


def knows(session: Session, budget_id: str, kept: Kept) -> bool:
    """Whether the chain holds that head, or a reconciliation took note of it."""
    if kept.head is not None:
        entry = repository.entry_at(session, budget_id, kept.head.sequence)
        if entry is not None and entry.hash == kept.head.hash:
            return True
    return any(
        store["object_sha256"] == kept.object_sha256
        for entry in repository.entries_of_kind(session, budget_id, "reconciled")
        for store in entry.details["store"]
    )


def require_sound(database: Database, budget_ids: Iterable[str]) -> None:
    """Raises BudgetLocked where a ledger does not know all that the store does, ServiceUnavailable without an answer.

    On a database that is not watched there is no store to ask; only locks count then.
    """
    for budget_id in sorted(budget_ids):
        if ledger.MOVED in database.info:
            try:
                database.info[ledger.MOVED](budget_id)
            except OSError as error:
                raise ServiceUnavailable("storage_unavailable", "The store does not answer; try again.") from error
        with database.reading() as session:
            service.require_unlocked(session.get_one(PrivacyBudget, budget_id))


def may_start(database: Database, job_id: str) -> bool:
    """Whether the store counts the job's reservations and its ledgers are sound. To be asked before each claim."""
    with database.reading() as session:
        touched = [budget.id for budget, _ in repository.of_job(session, job_id)]
    try:
        require_sound(database, touched)
    except (service.BudgetLocked, ServiceUnavailable) as error:
        log.warning("job_may_not_start", job_id=job_id, code=error.code)
        return False
    return True


def keep_all(database: Database) -> None:
    """One look at every budget: heads that a crash left behind are written, mismatches found."""
    if ledger.MOVED in database.info:
        with database.reading() as session:
            budget_ids = session.scalars(select(PrivacyBudget.id).order_by(PrivacyBudget.id)).all()
        for budget_id in budget_ids:
            try:
                database.info[ledger.MOVED](budget_id)
            except OSError:
                log.warning("head_not_kept", budget_id=budget_id)  # whoever sweeps has more to do than this


def reconcile(
    database: Database, storage: Storage, budget_id: str, rho: float | None, note: str | None, actor: str
) -> None:
    """`owner.reconcile`, with what the store holds by now; after the commit it holds the ledger's head again."""
    kept = read(storage, budget_id)
    with database.writing() as session:
        budget = service.lock(session, budget_id)
        store = None if kept is None or knows(session, budget_id, kept) else kept.evidence()
        owner.reconcile(session, budget, rho, note, actor, store=store)


def read(storage: Storage, budget_id: str) -> Kept | None:
    """What the store holds; None for nothing yet. Raises OSError where the store does not answer."""
    try:
        data = storage.get_range(key(budget_id), 0, _LARGEST)
    except FileNotFoundError:
        return None
    return Kept(_decode(budget_id, data), hashlib.sha256(data).hexdigest())


def _encode(budget_id: str, head: Head) -> bytes:
    content = {"budget_id": budget_id, "sequence": head.sequence, "hash": head.hash, "rho": head.rho}
    return json.dumps(content).encode()


def _decode(budget_id: str, data: bytes) -> Head | None:
    try:
        content = json.loads(data)
        head = Head(content["sequence"], content["hash"], float(content["rho"]))
        sane = type(head.sequence) is int and 0 < head.sequence < 2**31 and 0.0 <= head.rho < math.inf
    except (ValueError, KeyError, TypeError):
        return None
    return head if sane and content["budget_id"] == budget_id else None
