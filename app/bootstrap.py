"""The first start: a project, its privacy budget and one admin key."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.auth import service as auth
from app.budgets import service as budgets
from app.settings import Settings

PROJECT = "default"

#: Who the ledger says made the first budget: no key exists yet.
ACTOR = "bootstrap"


def bootstrap(session: Session, settings: Settings) -> str | None:
    """Sets up an empty database: the project, its budget from the settings, one admin key (a given one, or fresh).

    Returns the key's token, to be shown once; None where a project exists already.
    """
    if auth.is_set_up(session):
        return None
    project = auth.create_project(session, PROJECT)
    budgets.create(
        session,
        project_id=project.id,
        name=PROJECT,
        epsilon_limit=settings.budget_epsilon,
        delta=settings.budget_delta,
        actor=ACTOR,
        is_default=True,
    )
    chosen = settings.api_key.get_secret_value() if settings.api_key else None
    _, token = auth.create_key(session, project.id, "first", ["admin"], token=chosen)
    return token
