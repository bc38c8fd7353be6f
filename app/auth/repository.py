"""Statements over projects and keys."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.auth.tables import ApiKey, Project


def find_key_by_digest(session: Session, digest: str) -> ApiKey | None:
    """The key of this digest, revoked or not."""
    return session.scalar(select(ApiKey).where(ApiKey.digest == digest))


def find_key(session: Session, key_id: str) -> ApiKey | None:
    """The key of this id, revoked or not."""
    return session.get(ApiKey, key_id)


def list_keys(session: Session, project_id: str | None = None) -> list[ApiKey]:
    """Keys, oldest first, revoked ones included; of one project, or of all."""
    statement = select(ApiKey).order_by(ApiKey.id)
    if project_id is not None:
        statement = statement.where(ApiKey.project_id == project_id)
    return list(session.scalars(statement))


def find_project(session: Session, name: str) -> Project | None:
    """The project of this name."""
    return session.scalar(select(Project).where(Project.name == name))


def project_ids(session: Session) -> list[str]:
    """Ids of all projects."""
    return list(session.scalars(select(Project.id).order_by(Project.id)))


def any_project(session: Session) -> bool:
    """Whether the database has been set up."""
    return session.scalar(select(Project.id).limit(1)) is not None
