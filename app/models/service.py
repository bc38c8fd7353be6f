"""Fine-tuned models: published by their jobs, downloaded, deleted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.catalog.families import GROUP_NORM_CODE
from app.db.base import now
from app.db.session import Database
from app.errors import Conflict, InvalidRequest, NotFound
from app.ids import sortable_token
from app.models import repository
from app.models.catalog import (
    BaseModelUnavailable,
    as_base,
    base_path,
    bases,
    find_base,
    find_base_for,
    offers,
    package_path,
    refused,
)
from app.models.discovery import FINE_TUNED
from app.models.tables import Model, ModelUse
from app.settings import Settings
from app.storage import Storage

__all__ = [
    "BUNDLE_FILES",
    "BaseModelUnavailable",
    "as_base",
    "base_path",
    "bases",
    "delete",
    "erase",
    "find_base",
    "find_base_for",
    "get",
    "hold",
    "model_id",
    "note_export",
    "offers",
    "package_path",
    "publish",
    "refused",
    "release",
    "released_by",
    "stored_by",
    "sweep",
]

#: All that a bundle may hold. Weights as safetensors: nothing in it runs code when it is loaded, but for a file of our
#: own, word for word, where transformers lacks the class and whoever loads it allows that.
BUNDLE_FILES = frozenset(
    {
        GROUP_NORM_CODE,
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "metrics.json",
        "model.safetensors",
        "preprocessor_config.json",
        "privacy_report.json",
        "sentencepiece.bpe.model",
        "source.spm",
        "special_tokens_map.json",
        "target.spm",
        "target_vocab.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)

_LONGEST_ID = 96
_SHORT_ID = 8
_AT_ONCE = 100


def model_id(base: str, suffix: str | None, step_number: int | None = None) -> str:
    """`ft-<base>-<suffix>-<short id>`: a path segment, a repository name, 96 characters of [A-Za-z0-9._-] at most.

    Of a fine-tuned base its name is kept without its short id: ids do not grow from job to job. A checkpoint's has
    `step-<number>` before the short id.
    """
    if base.startswith(FINE_TUNED):
        base = re.sub(rf"-[0-9a-z]{{{_SHORT_ID}}}$", "", base.removeprefix(FINE_TUNED))
    short = sortable_token()[-_SHORT_ID:]
    step = "" if step_number is None else f"step-{step_number}"
    tail = "-".join(part for part in (_segment(suffix or ""), step, short) if part)
    stem = _segment(base)[: _LONGEST_ID - len("ft-") - 1 - len(tail)].rstrip("-.")
    return "-".join(part for part in ("ft", stem, tail) if part)


def _segment(text: str) -> str:
    """Hubs refuse `--` and `..` in a name."""
    return re.sub(r"([-.])[-.]+", r"\1", re.sub(r"[^A-Za-z0-9._-]+", "-", text)).strip("-.")


def publish(
    session: Session,
    *,
    project_id: str,
    job_id: str,
    base: str,
    suffix: str | None,
    storage_prefix: str,
    files: Sequence[Mapping[str, Any]],
    archives: Mapping[str, Any],
    metrics: Mapping[str, Any],
    privacy_report: Mapping[str, Any],
    base_facts: Mapping[str, Any] | None = None,
    step_number: int | None = None,
) -> Model:
    """The model's row. Its bytes are stored already; from this unit of work's commit on they can be downloaded.

    files: [{path, bytes, sha256, crc32}], in the order of the archives. step_number: of a checkpoint. Raises ValueError
    for a file that no bundle may hold: that is a bug, and nothing is published.
    """
    paths = [file["path"] for file in files]
    if len(set(paths)) != len(paths) or not set(paths) <= BUNDLE_FILES:
        raise ValueError("a bundle holds a file that is not on its list")
    model = Model(
        id=model_id(base, suffix, step_number),
        project_id=project_id,
        job_id=job_id,
        step_number=step_number,
        base=base,
        storage_prefix=storage_prefix,
        files=[dict(file) for file in files],
        archives=dict(archives),
        metrics=dict(metrics),
        privacy_report=dict(privacy_report),
        base_facts=None if base_facts is None else dict(base_facts),
        created_at=session.scalars(select(now())).one(),
    )
    session.add(model)
    session.flush()
    return model


def get(session: Session, project_id: str, identifier: str) -> Model:
    """The project's model of that id; NotFound without one, or where it is deleted."""
    model = repository.find(session, project_id, identifier)
    if model is None:
        raise NotFound("model")
    return model


def released_by(session: Session, project_id: str, job_id: str) -> Sequence[Model]:
    """What the job released and is still there: the finished model first, then checkpoints, the latest first."""
    return session.scalars(repository.of_job(project_id, job_id)).all()


def stored_by(session: Session, job_id: str) -> Sequence[str]:
    """The storage prefixes of what a job published, its checkpoints and its model, deleted or not."""
    return session.scalars(select(Model.storage_prefix).where(Model.job_id == job_id)).all()


def note_export(session: Session, identifier: str, format_: str, metrics: Mapping[str, Any] | None) -> bool:
    """Shows what an export's check found in the model's own metrics; None: no more. Whether the model is there."""
    model = session.scalars(
        select(Model)
        .where(Model.id == identifier, Model.deleted_at.is_(None))
        .with_for_update()
        .execution_options(populate_existing=True)  # another export may have ended since this unit of work read it
    ).one_or_none()
    if model is None:
        return False
    exports = {name: figures for name, figures in model.metrics.get("exports", {}).items() if name != format_}
    if metrics is not None:
        exports[format_] = dict(metrics)
    model.metrics = {**model.metrics, "exports": exports}
    session.flush()
    return True


def hold(session: Session, identifier: str, job_id: str) -> None:
    """A job starts from this model, and needs it until it is released. NotFound where it was deleted meanwhile."""
    model = session.get(Model, identifier, with_for_update={"key_share": True}, populate_existing=True)
    if model is None or model.deleted_at is not None:
        raise NotFound("model", param="model")
    session.add(ModelUse(model_id=identifier, job_id=job_id))
    session.flush()


def release(session: Session, job_id: str) -> None:
    """The job has ended. Releasing twice changes nothing."""
    for use in session.scalars(select(ModelUse).where(ModelUse.job_id == job_id)):
        session.delete(use)
    session.flush()


def delete(session: Session, settings: Settings, project_id: str, identifier: str) -> Model:
    """Deletes a model; what its job spent stays spent. Its bytes go after the commit, see `erase`.

    Conflict (model_in_use) while a job starts from it.
    """
    model = repository.lock(session, project_id, identifier)
    if model is None:
        if offers(settings, identifier):
            raise InvalidRequest("base_model", "A base model belongs to the catalog: it cannot be deleted.")
        raise NotFound("model")
    if repository.in_use(session, model.id):
        raise Conflict("model_in_use", "A job that has not ended starts from this model; cancel it, or wait.")
    model.deleted_at = session.scalars(select(now())).one()
    session.flush()
    return model


def erase(database: Database, storage: Storage, identifier: str) -> None:
    """Removes the bytes of a deleted model. Interrupted, it is repeated by `sweep`."""
    with database.reading() as session:
        prefix = session.get_one(Model, identifier).storage_prefix
    storage.delete_prefix(prefix)
    with database.writing() as session:
        session.get_one(Model, identifier).erased_at = session.scalars(select(now())).one()


def sweep(database: Database, storage: Storage) -> None:
    """Removes the bytes of deleted models that a crash has left."""
    with database.reading() as session:
        deleted = repository.to_erase(session, _AT_ONCE)
    for identifier in deleted:
        erase(database, storage, identifier)
