"""Queries of exports. What a project may not see, and what belongs to a deleted model, is not in them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Select, or_, select, update
from sqlalchemy.orm import Session

from app.db.base import now
from app.exports.tables import Export
from app.models.tables import Model


def of_model(model: Model) -> Select[Export]:
    """The model's exports that are there."""
    return select(Export).where(Export.model_id == model.id, Export.deleted_at.is_(None))


def find(session: Session, model: Model, export_id: str) -> Export | None:
    """The model's export of that id."""
    return session.scalars(of_model(model).where(Export.id == export_id)).one_or_none()


def find_format(session: Session, model: Model, format_: str) -> Export | None:
    """The model's export of that form."""
    return session.scalars(of_model(model).where(Export.format == format_)).one_or_none()


def of_jobs(session: Session, job_ids: Sequence[str]) -> dict[str, list[Export]]:
    """The exports of the jobs' models, oldest first, by job."""
    rows = session.execute(
        select(Model.job_id, Export)
        .join(Export, Export.model_id == Model.id)
        .where(Model.job_id.in_(job_ids), Model.deleted_at.is_(None), Export.deleted_at.is_(None))
        .order_by(Export.id)
    )
    found: dict[str, list[Export]] = {}
    for job_id, export in rows:
        found.setdefault(job_id, []).append(export)
    return found


def delete_orphans(session: Session) -> list[str]:
    """Deletes the exports of deleted models; their ids."""
    dead = select(Model.id).where(Model.deleted_at.is_not(None))
    return list(
        session.scalars(
            update(Export)
            .where(Export.deleted_at.is_(None), Export.model_id.in_(dead))
            .values(deleted_at=now())
            .returning(Export.id)
            .execution_options(synchronize_session=False)
        )
    )


def to_erase(session: Session, seconds: float, limit: int) -> list[tuple[str, str]]:
    """(id, prefix of the model) of exports that failed or were deleted longer ago than that and may have left bytes."""
    rows = session.execute(
        select(Export.id, Model.storage_prefix)
        .join(Model, Model.id == Export.model_id)
        .where(
            Export.erased_at.is_(None),
            or_(
                Export.deleted_at < now() - seconds,
                (Export.status == "failed") & (Export.finished_at < now() - seconds),
            ),
        )
        .order_by(Export.id)
        .limit(limit)
    )
    return [(export_id, prefix) for export_id, prefix in rows]


def queued(session: Session, seconds: float, limit: int) -> Sequence[str]:
    """Ids of queued exports at which nobody was hinted for so long, oldest first, under their locks."""
    return session.scalars(
        select(Export.id)
        .where(
            Export.status == "queued",
            Export.deleted_at.is_(None),
            or_(Export.hinted_at.is_(None), Export.hinted_at < now() - seconds),
        )
        .order_by(Export.id)
        .limit(limit)
        .with_for_update(skip_locked=True, key_share=True)
    ).all()
