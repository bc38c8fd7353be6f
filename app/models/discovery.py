"""The operator's folder of models: which there are, by name, and why one is not offered.

A model is a folder `NAME` or `ORGANISATION/NAME` with a config.json. Hidden folders are passed over. What was found is
kept in memory as long as no file of it changes; weights are hashed once, see `app.models.digests`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from app.catalog.bases import BASES, BaseModel, Source
from app.models import digests, model_folder
from app.models.folder_reader import CONFIG, MAX_ENTRIES, Refused
from app.models.model_folder import ModelFolder

log = structlog.get_logger(__name__)

#: More folders than this are not looked at.
MAX_MODELS = 1000

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")

#: Ids that begin so are of models that this server trained.
FINE_TUNED = "ft-"


@dataclass(frozen=True, slots=True)
class Found:
    """A folder of models, read: what is offered, and what is not, with the reason's code and words."""

    models: Mapping[str, ModelFolder]
    refused: Mapping[str, Refused]


_Fingerprint = tuple[tuple[str, int, int], ...]
_known: dict[tuple[Path, str], tuple[_Fingerprint, ModelFolder | Refused]] = {}


def scan(root: Path, source: Source = "folder") -> Found:
    """Everything under `root`; nothing where there is no such folder."""
    models: dict[str, ModelFolder] = {}
    refused: dict[str, Refused] = {}
    for number, (name, folder) in enumerate(_candidates(root)):
        if number >= MAX_MODELS:
            log.warning("too_many_models", limit=MAX_MODELS)
            break
        found = _inspected(folder, root, name, source)
        if isinstance(found, Refused):
            refused[name] = found
        else:
            models[name] = found
    return Found(models, refused)


def base_of(found: ModelFolder, data_dir: Path) -> BaseModel:
    """The base with its digest. Takes as long as hashing its weights does, the first time. Raises OSError."""
    return dataclasses.replace(found.base, digest=found.digest(lambda path: digests.sha256(path, data_dir)))


def base_now(found: ModelFolder, data_dir: Path) -> BaseModel:
    """The same at once: without a digest while nobody has hashed the weights, which then begins in the background."""
    try:
        return dataclasses.replace(found.base, digest=found.digest(lambda path: digests.known(path, data_dir)))
    except digests.Unknown:
        digests.later(found.weights.values(), data_dir)
        return found.base


def _candidates(root: Path) -> Iterator[tuple[str, Path]]:
    for name, folder in _folders(root):
        if (folder / CONFIG).exists():
            yield name, folder
        else:
            for inner, nested in _folders(folder):
                if (nested / CONFIG).exists():
                    yield f"{name}/{inner}", nested


def _folders(parent: Path) -> list[tuple[str, Path]]:
    """Visible folders of names that an id may have, in order."""
    try:
        entries = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir())
    except OSError:
        return []
    return [(name, parent / name) for name in entries if _NAME.fullmatch(name) and ".." not in name]


def _inspected(folder: Path, root: Path, name: str, source: Source) -> ModelFolder | Refused:
    try:
        fingerprint = _fingerprint(folder)
    except OSError as error:
        return Refused("unreadable", str(error.strerror))
    key = (folder, name)
    known = _known.get(key)
    if known is not None and known[0] == fingerprint:
        return known[1]
    try:
        if name in BASES or name.startswith(FINE_TUNED):
            raise Refused("name_taken", "another model has this id")
        inspected = model_folder.inspect(folder, root, name, source)
        # What it would copy is read again when a job needs it: tokenizers are large.
        found: ModelFolder | Refused = dataclasses.replace(inspected, small={})
    except Refused as error:
        log.warning("model_refused", model=name, code=error.code, reason=str(error))
        found = error
    except OSError as error:
        return Refused("unreadable", str(error.strerror))
    _known[key] = (fingerprint, found)
    return found


def _fingerprint(folder: Path) -> _Fingerprint:
    """Name, size and time of change of every entry, followed through links."""
    entries = []
    for entry in os.scandir(folder):
        try:
            status = entry.stat()
        except OSError:
            continue
        entries.append((entry.name, status.st_size, status.st_mtime_ns))
        if len(entries) > MAX_ENTRIES:
            break
    return tuple(sorted(entries))
