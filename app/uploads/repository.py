"""Queries of uploads. What a project may not see is not in them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.orm import Session

from app.db.base import now
from app.uploads.tables import Part, Upload


def find(session: Session, project_id: str, upload_id: str) -> Upload | None:
    """The project's upload of that id."""
    return session.scalars(readable(project_id).where(Upload.id == upload_id)).one_or_none()


def lock(session: Session, project_id: str, upload_id: str) -> Upload | None:
    """The same, under its lock: no other unit of work adds a part or ends it meanwhile."""
    statement = readable(project_id).where(Upload.id == upload_id).with_for_update(key_share=True)
    return session.scalars(statement.execution_options(populate_existing=True)).one_or_none()


def readable(project_id: str) -> Select[Upload]:
    """The project's uploads."""
    return select(Upload).where(Upload.project_id == project_id)


def find_by_idempotency_key(session: Session, project_id: str, key: str) -> Upload | None:
    """What an earlier request with this key began, whatever became of it."""
    return session.scalars(readable(project_id).where(Upload.idempotency_key == key)).one_or_none()


def pending(session: Session, project_id: str) -> int:
    """How many uploads of the project wait for parts."""
    waiting = (Upload.project_id == project_id, Upload.status == "pending", Upload.expires_at >= now())
    return session.scalars(select(func.count()).select_from(Upload).where(*waiting)).one()


def parts(upload_id: str) -> Select[Part]:
    """All parts of an upload."""
    return select(Part).where(Part.upload_id == upload_id)


def stored(session: Session, upload_id: str) -> tuple[int, int]:
    """How many parts there are, and how many bytes they have together."""
    count, size = session.execute(
        select(func.count(), func.coalesce(func.sum(Part.bytes), 0)).where(Part.upload_id == upload_id)
    ).one()
    return int(count), int(size)


def forget_parts(session: Session, upload_id: str) -> None:
    """Of an upload that has ended, once their bytes are gone."""
    session.execute(delete(Part).where(Part.upload_id == upload_id))


def expire(session: Session) -> Sequence[str]:
    """Ends uploads whose time is over; their ids."""
    return session.scalars(
        update(Upload)
        .where(Upload.status == "pending", Upload.erased_at.is_(None), Upload.expires_at < now())
        .values(status="expired")
        .returning(Upload.id)
        .execution_options(synchronize_session=False)
    ).all()


def to_erase(session: Session, limit: int) -> Sequence[tuple[str, str]]:
    """Project and id of ended uploads whose parts may still be there."""
    ended = select(Upload.project_id, Upload.id).where(Upload.status != "pending", Upload.erased_at.is_(None))
    return [(project_id, upload_id) for project_id, upload_id in session.execute(ended.limit(limit))]


def with_parts(session: Session, upload_ids: Sequence[str]) -> set[str]:
    """Those of the ids whose parts belong in the store."""
    return set(session.scalars(select(Upload.id).where(Upload.id.in_(upload_ids), Upload.erased_at.is_(None))))
