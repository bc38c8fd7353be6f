"""One export from claim to end: lays out a folder, follows the exporter, stores what it made, publishes it.

The exporter is a process like a trainer: no network, no credentials, a folder and a socket. It is given the model's
released files, the base, and rows of a file declared public; nothing private is in its reach.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from obstore.exceptions import BaseError as StoreError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import tether
from app.catalog.exports import EXPORT_FORMATS
from app.db.lease import LeaseLost
from app.exports import lifecycle
from app.exports.lifecycle import ClaimedExport
from app.jobs.tables import Job
from app.models import service as models
from worker import base_model, job_folder, reach, reporter, results
from worker.exporter.spec import (
    EXPORT_FOLDER,
    METRICS_FILE,
    MODEL_FOLDER,
    PUBLIC_FILE,
    ExportSpec,
    StudentSpec,
)
from worker.lease import Lease
from worker.trainer.messages import Failed, Finished
from worker.trainer_process import BadMessage, TrainerGone, TrainerProcess
from worker.workplace import Workplace

log = structlog.get_logger(__name__)

PROGRAM = tuple(tether.python("-m", "worker.exporter"))

#: What an export may hold beside its format's weights.
_BESIDE = frozenset({"export.json", *models.BUNDLE_FILES}) - {"model.safetensors", "metrics.json"}
_REQUIRED = frozenset({"README.md", "config.json", "export.json"})

#: The model's own bundle is an export that is checked, and not stored twice.
_BUNDLE = "safetensors"

#: Numbers of an export's metrics that leave the worker: an allow list, though none comes from a private row.
_NUMBERS = (
    "weights_bytes",
    "model_weights_bytes",
    "compression",
    "parameters",
    "agreement",
    "max_difference",
    "relative_difference",
    "max_relative_difference",
    "num_inputs",
    "rows_per_second",
    "model_rows_per_second",
    "speedup",
    "rank",
    "adapted_matrices",
    "num_layers",
    "model_num_layers",
    "n_epochs",
    "public_rows",
)

_LOOK = 0.2


class _Unworkable(Exception):
    """The export cannot be made; the text is the code that its user reads."""


def run_export(workplace: Workplace, export_id: str) -> None:
    """Claims the export and makes it, or gives it back. A stale hint does nothing."""
    if workplace.shutting_down.is_set():
        return
    seconds = workplace.settings.lease_seconds
    with workplace.database.writing() as session:
        claimed = lifecycle.claim(session, export_id, workplace.name, seconds)
    if claimed is None:
        return

    def heartbeat(session: Session, _progress: Mapping[str, Any] | None) -> bool:
        lifecycle.heartbeat(session, export_id, claimed.fence, seconds)
        return False

    with structlog.contextvars.bound_contextvars(export_id=export_id, fence=claimed.fence):
        try:
            with Lease(workplace.database, heartbeat, workplace.settings) as lease:
                _attempt(workplace, claimed, lease)
        except LeaseLost:
            log.warning("export_lost")
            workplace.storage.delete_prefix(_prefix(claimed))
        except (SQLAlchemyError, OSError, StoreError):
            log.exception("export_left_to_the_sweep")


def _attempt(workplace: Workplace, claimed: ClaimedExport, lease: Lease) -> None:
    database, settings = workplace.database, workplace.settings
    root, within = job_folder.folders_root(settings), reach.of_children(settings)
    exporter = TrainerProcess(root, reach=within, threads=settings.threads, program=PROGRAM)
    try:
        try:
            _lay_out(workplace, claimed, exporter)
            exporter.begin(b"")
            if not _follow(workplace, exporter, lease):
                exporter.kill()
                lease.end()
                with database.writing() as session:
                    lifecycle.requeue(session, claimed.export_id, claimed.fence)
                return
            fields = _stored(workplace, claimed, exporter)
            lease.end()
            with database.writing() as session:
                lifecycle.succeed(session, claimed.export_id, claimed.fence, fields)
            log.info("export_succeeded", format=claimed.format)
        except _Unworkable as reason:
            log.warning("export_failed", code=str(reason), **exporter.where_it_failed())
            lease.end()
            with database.writing() as session:
                lifecycle.fail(session, claimed.export_id, claimed.fence, str(reason))
        except (TrainerGone, BadMessage):
            log.warning("exporter_crashed", status=exporter.process.poll(), **exporter.where_it_failed())
            _abandon(workplace, claimed, lease, "exporter_error")
        except (OSError, StoreError):
            log.exception("storage_failed")
            _abandon(workplace, claimed, lease, "storage_error")
    finally:
        exporter.close()


def _abandon(workplace: Workplace, claimed: ClaimedExport, lease: Lease, code: str) -> None:
    lease.end()
    with workplace.database.writing() as session:
        queued = lifecycle.abandon(session, claimed.export_id, claimed.fence, workplace.settings, code)
    if queued:
        workplace.queue.hint_export(claimed.export_id)


def _lay_out(workplace: Workplace, claimed: ClaimedExport, exporter: TrainerProcess) -> None:
    """Fills the folder: the bundle, each file against its digest, the public rows, what is asked for."""
    folder, storage = exporter.folder.path, workplace.storage
    for attempt in storage.names(claimed.prefix):  # what earlier ones left; a later one may have published by now
        if int(attempt) < claimed.fence:
            storage.delete_prefix(f"{claimed.prefix}/{attempt}")
    try:
        job_folder.get_folder(
            storage,
            claimed.model_prefix,
            {file["path"]: file["sha256"] for file in claimed.files},
            folder / MODEL_FOLDER,
        )
    except job_folder.DamagedCheckpoint:
        raise _Unworkable("model_invalid") from None
    student = None
    if "student" in claimed.options:
        options = claimed.options["student"]
        told = {name: options[name] for name in ("source_prefix", "languages_of") if name in options}
        student = StudentSpec(options["columns"], options["num_layers"], options["n_epochs"], **told)
        rows = folder / PUBLIC_FILE
        rows.parent.mkdir()
        assert claimed.rows_key is not None
        storage.get_file(claimed.rows_key, rows)
        if job_folder.sha256(rows) != claimed.rows_digest:
            raise _Unworkable("data_mismatch")
    ExportSpec(
        export_id=claimed.export_id,
        model_id=claimed.model_id,
        job_id=claimed.job_id,
        base=claimed.base,
        format=claimed.format,
        weights_sha256=next(file["sha256"] for file in claimed.files if file["path"] == "model.safetensors"),
        base_path=_base_path(workplace, claimed, folder) if claimed.format == "adapter" else None,
        rank=claimed.rank,
        student=student,
        threads=workplace.settings.threads,
    ).write(folder)


@dataclass(frozen=True, slots=True)
class _Pinned:
    """The base, as the model's job pinned it."""

    project_id: str
    model: str
    resolved: Mapping[str, Any]


def _base_path(workplace: Workplace, claimed: ClaimedExport, folder: Path) -> str:
    with workplace.database.reading() as session:
        job = session.get(Job, claimed.job_id)
        pinned = _Pinned(claimed.project_id, claimed.base, (job.resolved if job else None) or {})
    try:
        return base_model.lay_out(workplace, pinned, folder).path
    except models.BaseModelUnavailable:
        log.exception("base_model_refused")
        raise _Unworkable("base_model_invalid") from None


def _follow(workplace: Workplace, exporter: TrainerProcess, lease: Lease) -> bool:
    """Waits until the export is made; False where this worker is asked to end. Raises TrainerGone, BadMessage."""
    deadline = time.monotonic() + workplace.settings.max_job_seconds
    while True:
        if lease.lost.is_set():
            raise LeaseLost
        if workplace.shutting_down.is_set():
            return False
        if time.monotonic() > deadline:
            raise _Unworkable("time_limit")
        for message in exporter.read(_LOOK):
            if isinstance(message, Failed):
                raise _Unworkable(message.code)
            if isinstance(message, Finished):
                return True


def _stored(workplace: Workplace, claimed: ClaimedExport, exporter: TrainerProcess) -> dict[str, Any]:
    """Stores exactly the files of the format under the fence's own prefix; the fields of `lifecycle.succeed`."""
    folder = exporter.folder.path
    made = folder / EXPORT_FOLDER
    try:
        metrics = _cleared(json.loads((folder / METRICS_FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        raise _Unworkable("exporter_error") from None
    if claimed.format == _BUNDLE:
        own = {"storage_prefix": claimed.model_prefix, "files": claimed.files, "archives": claimed.archives}
        return {**own, "metrics": metrics}
    form = EXPORT_FORMATS[claimed.format]
    report = json.dumps(claimed.privacy_report, ensure_ascii=False, indent=2)
    (made / results.REPORT).write_text(report, encoding="utf-8")
    allowed = _BESIDE | {*form.weights}
    names = tuple(
        path.name
        for path in sorted(made.iterdir())
        if path.name in allowed and path.is_file() and not path.is_symlink()
    )
    complete = any(_REQUIRED | needed <= {*names} for needed in form.needed)
    if not complete or not results.holds_only_our_code(made):
        raise _Unworkable("exporter_error")
    bundle = results.Bundle(made, names, metrics, claimed.privacy_report)
    return results.store(workplace.storage, _prefix(claimed), bundle)


def _prefix(claimed: ClaimedExport) -> str:
    return f"{claimed.prefix}/{claimed.fence}"


def _cleared(metrics: Mapping[str, Any]) -> dict[str, Any]:
    held_out = metrics.get("compared_on") == "held-out rows of the public file"
    return {
        **{name: metrics[name] for name in _NUMBERS if name in metrics and reporter.number(metrics[name])},
        "compared_on": "held-out rows of the public file" if held_out else "synthetic inputs",
    }
