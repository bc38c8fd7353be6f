"""The ledger: an append-only chain of what happened to a budget, each entry bound to the one before by SHA-256.

Whoever changes, drops or reorders an entry breaks every hash after it; whoever restores an older copy has an older
head. Entries hold DpEvents and ρ; ε is always derived from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.budgets.tables import LedgerEntry, PrivacyBudget
from app.db.base import now
from app.db.session import after_commit
from app.ids import new_id

Kind = Literal[
    "opened",
    "reserved",
    "charged",
    "released",
    "checkpoint_published",
    "closed",
    "renamed",
    "limit_raised",
    "limit_lowered",
    "policy_changed",
    "locked",
    "reconciled",
    "public_declared",
    "file_attached",
    "content_read",
    "report_read",
]

#: The head of an empty chain.
GENESIS = "0" * 64

#: The key in `Session.info` of what is called with a budget's id after each commit that moved its ledger.
MOVED = "ledger_moved"
_NOTED = "ledgers_noted"


def append(
    session: Session,
    budget: PrivacyBudget,
    kind: Kind,
    *,
    actor: str,
    job_id: str | None = None,
    rho: float = 0.0,
    dp_event: Mapping[str, Any] | None = None,
    details: Mapping[str, Any] | None = None,
) -> LedgerEntry:
    """Adds the next entry. The caller holds the budget's row lock (or has just made the row)."""
    entry = LedgerEntry(
        id=new_id("entry"),
        budget_id=budget.id,
        sequence=budget.next_sequence,
        kind=kind,
        job_id=job_id,
        actor=actor,
        rho=rho,
        dp_event=dict(dp_event) if dp_event is not None else None,
        details=dict(details or {}),
        created_at=session.scalars(select(now())).one(),
        previous_hash=budget.head_hash,
        hash="",
    )
    entry.hash = entry_hash(entry)
    session.add(entry)
    budget.next_sequence += 1
    budget.head_hash = entry.hash
    session.flush()
    _note(session, budget.id)
    return entry


def _note(session: Session, budget_id: str) -> None:
    noted = session.info.setdefault(_NOTED, set())
    if MOVED in session.info and budget_id not in noted:
        noted.add(budget_id)
        after_commit(session, partial(session.info[MOVED], budget_id))


def entry_hash(entry: LedgerEntry) -> str:
    """SHA-256 over the canonical JSON (sorted keys, no spaces) of every column but `id` and `hash`."""
    fields = {
        name: getattr(entry, name)
        for name in (
            "budget_id",
            "sequence",
            "kind",
            "job_id",
            "actor",
            "rho",
            "dp_event",
            "details",
            "created_at",
            "previous_hash",
        )
    }
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def first_broken(entries: Iterable[LedgerEntry], budget: PrivacyBudget) -> int | None:
    """The first sequence number at which the chain does not hold, or None. `entries`: all of them, in order.

    A chain that ends before the budget's head is broken at the number that is missing.
    """
    expected, previous = 1, GENESIS
    for entry in entries:
        if entry.sequence != expected or entry.previous_hash != previous or entry.hash != entry_hash(entry):
            return expected
        expected, previous = expected + 1, entry.hash
    return None if (expected, previous) == (budget.next_sequence, budget.head_hash) else expected
