"""Base models on this machine: which there are, and where their files lie."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from app.catalog.bases import BASES, BaseModel

WEIGHTS = "model.safetensors"


class BaseModelUnavailable(LookupError):
    """The package that carries the base is not installed, or its weights are not the catalog's."""


def bases() -> Sequence[BaseModel]:
    """All that a job may start from."""
    return tuple(BASES.values())


def find_base(name: str) -> BaseModel | None:
    """The base of that id."""
    return BASES.get(name)


def base_path(base: BaseModel) -> Path:
    """The folder with config, weights and tokenizer, the weights checked against the catalog's digest.

    The package is found, never imported: none of its code runs. Raises BaseModelUnavailable.
    """
    found = importlib.util.find_spec(base.package) if base.package.isidentifier() else None
    for location in (found.submodule_search_locations or ()) if found else ():
        folder = Path(location) / base.path
        weights = folder / WEIGHTS
        if weights.is_file():
            status = weights.stat()
            if _digest(weights, status.st_size, status.st_mtime_ns) != base.digest:
                raise BaseModelUnavailable(f"the weights of {base.id} are not the catalog's")
            return folder
    raise BaseModelUnavailable(f"the package {base.package} is not installed")


@functools.lru_cache(maxsize=64)
def _digest(path: Path, _size: int, _modified: int) -> str:
    """Computed again where the file has changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
