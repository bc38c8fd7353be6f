"""A job's secret key: from the operating system's entropy, wrapped in a row of its own, erased at settlement.

Masks and noise are a pure function of this key, so that a replayed step draws the same randomness. The wrapping
(AES-256 in GCM, under the server's secret) is bound to the job, to the digests of its rows and to its plan: a key that
is moved to another job, other data or another plan does not open.
"""

from __future__ import annotations

import json
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import delete
from sqlalchemy.orm import Session

from app.jobs.tables import Job, JobKey

_KEY_BYTES = 32
_NONCE_BYTES = 12


class KeyUnavailable(Exception):
    """The job's key was erased, or does not open under this secret, this data and this plan."""


def create(session: Session, job: Job, secret: bytes) -> None:
    """Makes and stores the key of a job whose data and plan are fixed."""
    nonce = os.urandom(_NONCE_BYTES)
    wrapped = nonce + AESGCM(secret).encrypt(nonce, os.urandom(_KEY_BYTES), _binding(job))
    session.add(JobKey(job_id=job.id, wrapped=wrapped))
    session.flush()


def unwrap(session: Session, job: Job, secret: bytes) -> bytes:
    """The job's 32 secret bytes. Raises KeyUnavailable."""
    row = session.get(JobKey, job.id)
    if row is None:
        raise KeyUnavailable("erased")
    try:
        return AESGCM(secret).decrypt(row.wrapped[:_NONCE_BYTES], row.wrapped[_NONCE_BYTES:], _binding(job))
    except InvalidTag as error:
        raise KeyUnavailable("the secret, the data or the plan is another one") from error


def erase(session: Session, job_id: str) -> None:
    """Nothing can draw this job's noise again (but a backup that holds the row and the secret)."""
    session.execute(delete(JobKey).where(JobKey.job_id == job_id))


def _binding(job: Job) -> bytes:
    resolved = job.resolved or {}
    return json.dumps(
        [job.id, resolved.get("training_digest"), resolved.get("validation_digest"), job.plan_digest]
    ).encode()
