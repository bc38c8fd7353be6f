"""What the rest of the service may ask of a store.

Keys are made of our own ids and fixed names, joined by `/`; nothing that a user chose is ever part of one. A write is
atomic: a reader sees the whole object, the one before it, or none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

#: Bytes of one read when streaming: large enough that the per-chunk cost vanishes, small enough for many at once.
CHUNK = 2**20

OCTETS = "application/octet-stream"


class StorageUnavailable(OSError):
    """The store does not answer, or refuses: a fault of the deployment, never of a request."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What is known of an object without reading it."""

    key: str
    size: int


class Writer(Protocol):
    """Takes an object's bytes in order; a slow store slows the sender (no unbounded buffer)."""

    async def write(self, data: bytes) -> None:
        """Appends; the bytes are on their way when it returns."""
        ...


class Storage(Protocol):
    """Objects under keys. Reading a missing key raises FileNotFoundError; whatever else fails, an OSError."""

    def put_bytes(self, key: str, data: bytes, content_type: str = OCTETS) -> None:
        """Writes a small object."""
        ...

    def put_file(self, key: str, path: Path, content_type: str = OCTETS) -> None:
        """Writes a file's bytes."""
        ...

    def put_stream(self, key: str, content_type: str = OCTETS) -> AbstractAsyncContextManager[Writer]:
        """A writer; the object appears when the block ends, and never where it raises."""
        ...

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes start (included) to end (excluded), fewer where the object ends earlier."""
        ...

    def stream(self, key: str, start: int = 0, end: int | None = None, chunk: int = CHUNK) -> Iterator[bytes]:
        """The same range in pieces of about `chunk` bytes; to the object's end without `end`."""
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Copies an object into a file."""
        ...

    def head(self, key: str) -> Stored | None:
        """Size, or None where there is no such object."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        ...

    def delete(self, key: str) -> None:
        """Removes an object; removing one that is gone is no error."""
        ...

    def delete_prefix(self, prefix: str, keep: Collection[str] = ()) -> None:
        """Removes every object below `prefix/`, but for those below one of `keep/`."""
        ...

    def names(self, prefix: str) -> Sequence[str]:
        """The names that come next in keys below `prefix/`, where more follows them; none without such keys."""
        ...

    def local_path(self, key: str) -> Path | None:
        """Where the object lies on this machine, for readers that want a path; None for remote stores."""
        ...


def check_key(key: str) -> str:
    """The key itself. ValueError on one that could leave its prefix: keys are made by us, so that is a bug."""
    parts = key.split("/")
    if not all(parts) or any(part in (".", "..") for part in parts) or "\\" in key or "\0" in key:
        raise ValueError("not a storage key")
    return key
