"""An export in a worker's hands: claim, heartbeat, end. All the SQL that the worker needs.

As of a job: a claim is a lease with a fence, and every write is guarded by an UPDATE on fence and status; zero rows
mean that the export was taken over, deleted or ended: nothing was written, LeaseLost is raised. An export costs no
privacy, so one that is lost is simply made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.db.base import now
from app.db.lease import LeaseLost
from app.exports import repository
from app.exports.service import lora_rank, phases_of, prefix
from app.exports.tables import Export
from app.files import service as files
from app.models import service as models
from app.models.tables import Model
from app.settings import Settings

#: A sweep hints at this many queued exports, and at one no oftener than this.
HINTS, HINT_SECONDS = 50, 60.0

_ERASE_AT_ONCE = 100

#: What an export can fail with, and what its user reads; the exporter's own codes are in `worker.exporter.spec`, which
#: the service may not import; a contract test holds the two together.
FAILURES: dict[str, str] = {
    "format_not_supported": "Models of this architecture have no export of this format.",
    "export_check_failed": "The export did not load in its runtime, or answered otherwise than the model.",
    "student_not_smaller": "The student would have as many layers as the model: ask for fewer, by `num_layers`.",
    "student_check_failed": "The student does not follow the model on rows that were held out.",
    "model_invalid": "The model's bundle cannot be loaded.",
    "base_model_invalid": "The base model cannot be loaded.",
    "adapter_not_exact": "What the model learnt is no low-rank change of its base.",
    "data_mismatch": "The public file does not hold the text that the student is to be trained on.",
    "out_of_memory": "The exporting process ran out of memory.",
    "exporter_error": "The exporting process failed.",
    "worker_lost": "The worker stopped answering, more often than this server allows.",
    "time_limit": "The export took longer than this server allows.",
    "storage_error": "The export's files could not be read or written.",
}


@dataclass(frozen=True, slots=True)
class ClaimedExport:
    """What an attempt needs to know. files: of the model's bundle. rank: of the job's LoRA, where it trained one.

    rows_key, rows_digest: of the public file's rows, where a student is distilled.
    """

    export_id: str
    project_id: str
    model_id: str
    job_id: str
    base: str
    format: str
    fence: int
    model_prefix: str
    files: list[Mapping[str, Any]]
    archives: Mapping[str, Any]
    privacy_report: Mapping[str, Any]
    options: Mapping[str, Any]
    rank: int | None
    rows_key: str | None
    rows_digest: str | None

    @property
    def prefix(self) -> str:
        """Where all attempts store."""
        return prefix(self.model_prefix, self.export_id)


def claim(session: Session, export_id: str, worker: str, lease_seconds: float) -> ClaimedExport | None:
    """Takes a queued export: a new fence, one attempt more, a lease. None where it is not there, or not queued."""
    export = session.scalars(
        update(Export)
        .where(Export.id == export_id, Export.status == "queued", Export.deleted_at.is_(None))
        .values(
            status="running",
            fence=Export.fence + 1,
            attempts=Export.attempts + 1,
            worker=worker,
            lease_expires_at=now() + lease_seconds,
        )
        .returning(Export)
        .execution_options(populate_existing=True)
    ).one_or_none()
    if export is None:
        return None
    model = session.get_one(Model, export.model_id)
    if model.deleted_at is not None:
        return None  # the sweep deletes the export, too
    export.started_at = session.scalars(select(now())).one()
    session.flush()
    student = export.options.get("student")
    public = files.get(session, export.project_id, student["training_file"]) if student else None
    assert public is None or public.public
    return ClaimedExport(
        export_id=export.id,
        project_id=export.project_id,
        model_id=model.id,
        job_id=model.job_id,
        base=model.base,
        format=export.format,
        fence=export.fence,
        model_prefix=model.storage_prefix,
        files=list(model.files),
        archives=model.archives,
        privacy_report=model.privacy_report,
        options=export.options,
        rank=lora_rank(phases_of(model)),
        rows_key=None if public is None else public.rows_key,
        rows_digest=None if public is None else public.rows_digest,
    )


def heartbeat(session: Session, export_id: str, fence: int, lease_seconds: float) -> None:
    """Renews the lease."""
    _guarded(session, export_id, fence, lease_expires_at=now() + lease_seconds)


def succeed(session: Session, export_id: str, fence: int, fields: Mapping[str, Any]) -> None:
    """Publishes an export. fields: storage_prefix, files, archives, metrics. Its model's metrics show it from now."""
    export = _guarded(session, export_id, fence)
    if not models.note_export(session, export.model_id, export.format, fields["metrics"]):
        raise LeaseLost(export_id)  # the model was deleted meanwhile
    export.storage_prefix = fields["storage_prefix"]
    export.files = [dict(file) for file in fields["files"]]
    export.archives = dict(fields["archives"])
    export.metrics = dict(fields["metrics"])
    _end(session, export, "succeeded", None)


def fail(session: Session, export_id: str, fence: int, code: str) -> None:
    """Ends an export that cannot be made. code: one of FAILURES; an unknown one is told as `exporter_error`."""
    _end(session, _guarded(session, export_id, fence), "failed", code)


def abandon(session: Session, export_id: str, fence: int, settings: Settings, code: str) -> bool:
    """Gives the export back after a crash. Whether it is queued again; else its attempts are used up, and it failed."""
    return _take_back(session, _guarded(session, export_id, fence), settings, code)


def requeue(session: Session, export_id: str, fence: int) -> None:
    """Gives the export back, at a graceful stop of the worker: the attempt does not count."""
    _release(session, _guarded(session, export_id, fence, attempts=Export.attempts - 1))


def sweep(session: Session, settings: Settings) -> list[str]:
    """Takes exports from workers that fell silent, deletes those of deleted models; ids of queued ones to hint at."""
    for export_id in repository.delete_orphans(session):
        files.release(session, export_id)
    expired = session.scalars(
        select(Export)
        .where(Export.status == "running", Export.lease_expires_at < now(), Export.deleted_at.is_(None))
        .order_by(Export.id)
        .with_for_update(skip_locked=True, key_share=True)
        .execution_options(populate_existing=True)
    ).all()
    for export in expired:
        _take_back(session, export, settings, "worker_lost")
    ids = list(repository.queued(session, HINT_SECONDS, HINTS))
    if ids:
        session.execute(update(Export).where(Export.id.in_(ids)).values(hinted_at=now()))
    return ids


def waiting(session: Session, model_id: str) -> list[str]:
    """Ids of the model's queued exports, to be hinted at."""
    return list(session.scalars(select(Export.id).where(Export.model_id == model_id, Export.status == "queued")))


def to_erase(session: Session, settings: Settings) -> list[tuple[str, str]]:
    """(id, prefix) of exports that failed or were deleted a lease's time ago: no worker writes there any more."""
    rows = repository.to_erase(session, settings.lease_seconds, _ERASE_AT_ONCE)
    return [(export_id, prefix(model_prefix, export_id)) for export_id, model_prefix in rows]


def note_erased(session: Session, export_ids: list[str]) -> None:
    """What these exports had stored is gone."""
    session.execute(update(Export).where(Export.id.in_(export_ids)).values(erased_at=now()))


def _guarded(session: Session, export_id: str, fence: int, **values: Any) -> Export:
    export = session.scalars(
        update(Export)
        .where(Export.id == export_id, Export.fence == fence, Export.status == "running", Export.deleted_at.is_(None))
        .values(**(values or {"fence": fence}))  # an UPDATE that changes nothing still takes the lock
        .returning(Export)
        .execution_options(populate_existing=True)
    ).one_or_none()
    if export is None:
        raise LeaseLost(export_id)
    return export


def _take_back(session: Session, export: Export, settings: Settings, code: str) -> bool:
    if export.attempts >= settings.max_attempts:
        _end(session, export, "failed", code)
        return False
    _release(session, export)
    return True


def _release(session: Session, export: Export) -> None:
    export.status = "queued"
    export.worker = None
    export.lease_expires_at = None
    export.hinted_at = None
    session.flush()


def _end(session: Session, export: Export, status: str, code: str | None) -> None:
    export.status = status
    export.worker = None
    export.lease_expires_at = None
    export.finished_at = session.scalars(select(now())).one()
    if code is not None:
        known = code if code in FAILURES else "exporter_error"
        export.error = {"code": known, "message": FAILURES[known]}
    session.flush()
    files.release(session, export.id)
