"""Rows of projects and API keys."""

from __future__ import annotations

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, Json


class Project(Base):
    """An owner of files, jobs, models and budgets; nothing is shared between two."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    created_at: Mapped[float]


class ApiKey(Base):
    """A bearer token's digest: the token itself is shown once and stored nowhere."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(String(128))
    prefix: Mapped[str] = mapped_column(String(16))
    """The token's first characters, by which a person recognises it."""
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    """SHA-256 in hexadecimal: a token has 130 random bits, so a slow hash would add nothing."""
    scopes: Mapped[list[str]] = mapped_column(Json)
    created_at: Mapped[float]
    revoked_at: Mapped[float | None]
