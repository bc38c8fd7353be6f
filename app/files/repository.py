"""Queries of files. What a project may not see is not in them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Select, and_, delete, exists, or_, select, update
from sqlalchemy.orm import Session, aliased

from app.auth.tables import Project
from app.db.base import now
from app.files.tables import File, FileTruncation, FileUse


def readable(project_id: str) -> Select[File]:
    """The project's files that are there."""
    return select(File).where(File.project_id == project_id, File.deleted_at.is_(None))


def find(session: Session, project_id: str, file_id: str) -> File | None:
    """The project's file of that id."""
    return session.scalars(readable(project_id).where(File.id == file_id)).one_or_none()


def lock(session: Session, project_id: str, file_id: str) -> File | None:
    """The same, under its lock: no other unit of work deletes it or begins to use it meanwhile."""
    statement = (
        readable(project_id)
        .where(File.id == file_id)
        .with_for_update(key_share=True)  # keys never change: rows that refer to this one need not wait
        .execution_options(populate_existing=True)
    )
    return session.scalars(statement).one_or_none()


def lock_project(session: Session, project_id: str) -> None:
    """Lets one upload of a project at a time decide what its bytes belong to."""
    session.execute(select(Project.id).where(Project.id == project_id).with_for_update(key_share=True))


def find_by_idempotency_key(session: Session, project_id: str, key: str) -> File | None:
    """What an earlier request with this key made, deleted or not."""
    return session.scalars(select(File).where(File.project_id == project_id, File.idempotency_key == key)).one_or_none()


def latest_private_twin(session: Session, project_id: str, sha256: str) -> File | None:
    """The newest protected file of the same bytes, deleted ones included."""
    return session.scalars(
        select(File)
        .where(File.project_id == project_id, File.sha256 == sha256, File.public.is_(False))
        .order_by(File.id.desc())
        .limit(1)
    ).one_or_none()


def were_private(session: Session, project_id: str, rows_digest: str) -> bool:
    """Whether a protected file, deleted ones included, has these rows in whatever format."""
    return session.scalars(
        select(exists().where(File.project_id == project_id, File.rows_digest == rows_digest, File.public.is_(False)))
    ).one()


def units_of_bytes(session: Session, project_id: str, sha256: str) -> set[str | None]:
    """The unit columns under which these bytes are protected; None stands for the record."""
    return set(session.scalars(_units(project_id).where(File.sha256 == sha256)))


def units_of_rows(session: Session, project_id: str, rows_digest: str) -> set[str | None]:
    """The same of rows that were read, in whatever format."""
    return set(session.scalars(_units(project_id).where(File.rows_digest == rows_digest)))


def budget_of_rows(session: Session, project_id: str, rows_digest: str) -> str | None:
    """What jobs on these rows are charged to, by the newest protected file that has them, in whatever format."""
    return session.scalars(
        select(File.budget_id)
        .where(_binds(project_id), File.rows_digest == rows_digest)
        .order_by(File.id.desc())
        .limit(1)
    ).one_or_none()


def _units(project_id: str) -> Select[str | None]:
    return select(File.unit_column).where(_binds(project_id))


def _binds(project_id: str) -> ColumnElement[bool]:
    """A deleted file that no job ever held has promised nobody anything: it binds no more."""
    return and_(
        File.project_id == project_id,
        File.public.is_(False),
        or_(File.deleted_at.is_(None), File.used_at.is_not(None)),
    )


def in_use(session: Session, file_id: str) -> bool:
    """Whether a job still needs it."""
    return session.scalars(select(exists().where(FileUse.file_id == file_id))).one()


def waiting(session: Session, limit: int) -> Sequence[str]:
    """Ids of files that nobody processes and that are due, oldest first."""
    return session.scalars(select(File.id).where(*_due()).order_by(File.id).limit(limit)).all()


def claim(session: Session, file_id: str, seconds: float) -> File | None:
    """Takes a waiting file for so long; None where it is done, deleted or another's, or its turn has not come."""
    return session.scalars(
        update(File)
        .where(File.id == file_id, *_due())
        .values(claimed_until=now() + seconds, attempts=File.attempts + 1, bytes_read=0)
        .returning(File)
        .execution_options(synchronize_session=False)
    ).one_or_none()


def renew(session: Session, file_id: str, attempt: int, seconds: float, bytes_read: int) -> bool:
    """Extends the claim that was the file's attempt of that number, which has read so far; False where it is another's
    by now."""
    renewed = session.scalars(
        update(File)
        .where(File.id == file_id, File.attempts == attempt, File.claimed_until.is_not(None))
        .values(claimed_until=now() + seconds, bytes_read=bytes_read)
        .returning(File.id)
        .execution_options(synchronize_session=False)
    )
    return renewed.one_or_none() is not None


def give_back(session: Session, file_id: str, attempt: int) -> None:
    """Ends the claim that was the file's attempt of that number, unless it is another's by now."""
    session.execute(
        update(File)
        .where(File.id == file_id, File.attempts == attempt)
        .values(claimed_until=None)
        .execution_options(synchronize_session=False)
    )


def expired(session: Session, limit: int) -> Sequence[File]:
    """Files whose time is over and that no job needs, under their locks."""
    return session.scalars(
        select(File)
        .where(File.deleted_at.is_(None), File.expires_at < now(), ~exists().where(FileUse.file_id == File.id))
        .with_for_update(skip_locked=True)
        .limit(limit)
    ).all()


def to_erase(session: Session, limit: int) -> Sequence[tuple[str, str]]:
    """Project and id of deleted files whose bytes may still be there."""
    rows = session.execute(
        select(File.project_id, File.id).where(File.deleted_at.is_not(None), File.erased_at.is_(None)).limit(limit)
    )
    return [(project_id, file_id) for project_id, file_id in rows]


def known(session: Session, file_ids: Sequence[str]) -> set[str]:
    """Those of the ids that have a row, deleted or not."""
    return set(session.scalars(select(File.id).where(File.id.in_(file_ids))))


def kept(session: Session, file_ids: Sequence[str]) -> set[str]:
    """Those of the ids whose bytes belong in the store, or may still be there."""
    return set(session.scalars(select(File.id).where(File.id.in_(file_ids), File.erased_at.is_(None))))


def truncations(session: Session, file_id: str, jobs: int) -> Sequence[FileTruncation]:
    """What the latest so many jobs cut of the file, the latest first."""
    of_file = FileTruncation.file_id == file_id
    latest = select(FileTruncation.job_id).where(of_file).distinct().order_by(FileTruncation.job_id.desc()).limit(jobs)
    return session.scalars(
        select(FileTruncation)
        .where(of_file, FileTruncation.job_id.in_(latest.scalar_subquery()))
        .order_by(FileTruncation.job_id.desc(), FileTruncation.dataset)
    ).all()


def truncation_fences(session: Session, file_id: str, job_id: str) -> Sequence[int]:
    """Fences of the attempts whose figures are committed."""
    return session.scalars(
        select(FileTruncation.fence)
        .where(FileTruncation.file_id == file_id, FileTruncation.job_id == job_id)
        .distinct()
    ).all()


def forget_truncations(session: Session, file_id: str) -> None:
    """Of a file whose bytes are gone."""
    session.execute(delete(FileTruncation).where(FileTruncation.file_id == file_id))


def _due() -> tuple[ColumnElement[bool], ...]:
    """What waits to be read. One declared public waits for all that were protected before it, since one of them may
    turn out to have its rows. (None can come before it any more: files are made under their project's lock.)"""
    before = aliased(File)
    protected = exists().where(
        before.project_id == File.project_id,
        before.status == "uploaded",
        before.deleted_at.is_(None),
        before.public.is_(False),
        before.created_at <= File.created_at,
    )
    return (
        File.status == "uploaded",
        File.deleted_at.is_(None),
        or_(File.claimed_until.is_(None), File.claimed_until < now()),
        or_(File.public.is_(False), ~protected),
    )
