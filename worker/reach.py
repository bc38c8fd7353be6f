"""What the worker's children may reach of its host: base models; nothing that the service keeps."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from sqlalchemy import make_url

from app.settings import Settings
from worker import job_folder
from worker.trainer.landlock import Reach


def conversions(settings: Settings) -> Path:
    """Where packages' weights are kept that had to be converted. Made where it is not there yet, so that a process that
    runs already reaches what comes into it."""
    folder = settings.data_dir.resolve() / "converted"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def of_children(settings: Settings) -> Reach:
    """To read, the operator's models and converted ones; closed, the data folder, and those of database and store where
    they are files elsewhere."""
    database, store = make_url(settings.database), urlsplit(settings.storage)
    closed = [settings.data_dir.resolve(), job_folder.folders_root(settings)]
    if database.get_backend_name() == "sqlite" and database.database:
        closed.append(Path(database.database).resolve().parent)  # with its journal
    if store.scheme == "file":
        closed.append(Path(unquote(store.path)).resolve())
    models = [settings.models_dir.resolve()] if settings.models_dir is not None else []
    return Reach((*models, conversions(settings)), tuple(closed))
