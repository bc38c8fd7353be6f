"""Projects, keys and callers."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.auth import repository, tokens
from app.auth.tables import ApiKey, Project
from app.db.base import now
from app.errors import InvalidRequest, NotFound, Unauthorized
from app.ids import new_id

Scope = Literal["read", "submit", "admin"]

#: What each scope brings with it: admin ⊃ submit ⊃ read.
IMPLIED: dict[str, frozenset[str]] = {
    "read": frozenset({"read"}),
    "submit": frozenset({"submit", "read"}),
    "admin": frozenset({"admin", "submit", "read"}),
}

#: A token that the operator chose must be at least this long.
SHORTEST_TOKEN = 20


@dataclass(frozen=True)
class Caller:
    """Who makes a request: every query is limited to the project."""

    project_id: str
    key_id: str
    scopes: frozenset[str]
    """With all that they imply."""

    def may(self, scope: Scope) -> bool:
        """Whether the key reaches this far."""
        return scope in self.scopes


def authenticate(session: Session, token: str) -> Caller:
    """The caller whose token this is. Unauthorized when it is unknown, malformed or revoked: all answer alike."""
    digest = tokens.digest(token)
    key = repository.find_key_by_digest(session, digest) if tokens.is_well_formed(token) else None
    if key is None or key.revoked_at is not None or not hmac.compare_digest(key.digest, digest):
        raise Unauthorized("invalid_api_key", "The API key is unknown or was revoked.")
    return Caller(key.project_id, key.id, frozenset().union(*(IMPLIED[scope] for scope in key.scopes)))


def project_ids(session: Session) -> list[str]:
    """Ids of all projects."""
    return repository.project_ids(session)


def create_project(session: Session, name: str) -> Project:
    """A new project. InvalidRequest when the name is taken."""
    if repository.find_project(session, name) is not None:
        raise InvalidRequest("project_exists", "A project of this name exists already.", param="name")
    project = Project(id=new_id("proj"), name=name, created_at=_now(session))
    session.add(project)
    session.flush()
    return project


def get_project(session: Session, name: str) -> Project:
    """The project of this name; NotFound."""
    project = repository.find_project(session, name)
    if project is None:
        raise NotFound("project", param="name")
    return project


def create_key(
    session: Session, project_id: str, name: str, scopes: Iterable[str], token: str | None = None
) -> tuple[ApiKey, str]:
    """A new key and its token, which nothing can show again. token: one that the operator chose, else a fresh one.

    InvalidRequest for scopes that do not exist, and for a chosen token that is short, broken or in use.
    """
    granted = sorted(set(scopes))
    if not granted or not IMPLIED.keys() >= set(granted):
        raise InvalidRequest("invalid_scope", f"Scopes are {', '.join(get_args(Scope))}.", param="scopes")
    if token is None:
        token = tokens.new_token()
    elif len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidRequest(
            "weak_api_key", f"A key of your own needs at least {SHORTEST_TOKEN} printable ASCII characters, no spaces."
        )
    elif not tokens.is_well_formed(token):
        raise InvalidRequest("invalid_api_key", "The key starts like one of ours, but its checksum does not fit.")
    digest = tokens.digest(token)
    if repository.find_key_by_digest(session, digest) is not None:
        raise InvalidRequest("api_key_exists", "This key exists already.")
    key = ApiKey(
        id=new_id("key"),
        project_id=project_id,
        name=name,
        prefix=token[: tokens.SHOWN],
        digest=digest,
        scopes=granted,
        created_at=_now(session),
    )
    session.add(key)
    session.flush()
    return key, token


def list_keys(session: Session, project_id: str | None = None) -> list[ApiKey]:
    """Keys, oldest first, revoked ones included; of one project, or of all."""
    return repository.list_keys(session, project_id)


def revoke_key(session: Session, key_id: str) -> ApiKey:
    """From this transaction's commit on the key opens nothing. NotFound; revoking twice changes nothing."""
    key = repository.find_key(session, key_id)
    if key is None:
        raise NotFound("key")
    if key.revoked_at is None:
        key.revoked_at = _now(session)
        session.flush()
    return key


def is_set_up(session: Session) -> bool:
    """Whether any project exists."""
    return repository.any_project(session)


def _now(session: Session) -> float:
    return session.scalars(select(now())).one()
