"""Queries of models. What a project may not see is not in them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Select, exists, select
from sqlalchemy.orm import Session

from app.models.tables import Model, ModelUse


def readable(project_id: str) -> Select[Model]:
    """The project's models that are there."""
    return select(Model).where(Model.project_id == project_id, Model.deleted_at.is_(None))


def find(session: Session, project_id: str, model_id: str) -> Model | None:
    """The project's model of that id."""
    return session.scalars(readable(project_id).where(Model.id == model_id)).one_or_none()


def lock(session: Session, project_id: str, model_id: str) -> Model | None:
    """The same, under its lock."""
    return session.scalars(readable(project_id).where(Model.id == model_id).with_for_update()).one_or_none()


def of_job(project_id: str, job_id: str) -> Select[Model]:
    """What the job released and is still there: the finished model first, then checkpoints, the latest first."""
    return (
        readable(project_id)
        .where(Model.job_id == job_id)
        .order_by(Model.step_number.is_not(None), Model.step_number.desc())
    )


def to_erase(session: Session, limit: int) -> Sequence[str]:
    """Ids of deleted models whose bytes may still be there."""
    return session.scalars(
        select(Model.id).where(Model.deleted_at.is_not(None), Model.erased_at.is_(None)).limit(limit)
    ).all()


def in_use(session: Session, model_id: str) -> bool:
    """Whether a job still needs it as its base."""
    return session.scalars(select(exists().where(ModelUse.model_id == model_id))).one()
