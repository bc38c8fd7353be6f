"""Joins the parts of an upload to the bytes of one file: piece by piece, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from starlette.concurrency import iterate_in_threadpool

from app.storage import Storage


@dataclass(frozen=True, slots=True)
class Digests:
    """Of the joined bytes, in lower-case hexadecimal."""

    sha256: str
    md5: str


class Mismatch(Exception):
    """The joined bytes have another MD5 than they were to have."""

    def __init__(self, md5: str) -> None:
        super().__init__()
        self.md5 = md5


async def join(storage: Storage, keys: Sequence[str], target: str, md5: str | None) -> Digests:
    """Stores the objects' bytes, in order, under `target`.

    md5: what they must have, in hexadecimal. Raises Mismatch, and FileNotFoundError where a part is gone: then nothing
    is stored.
    """
    sha256, checksum = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

    def pieces() -> Iterator[bytes]:  # in threads, hashing included
        for key in keys:
            for piece in storage.stream(key):
                sha256.update(piece)
                checksum.update(piece)
                yield piece

    async with storage.put_stream(target) as writer:
        async for piece in iterate_in_threadpool(pieces()):
            await writer.write(piece)
        if md5 is not None and checksum.hexdigest() != md5.lower():
            raise Mismatch(checksum.hexdigest())
    return Digests(sha256.hexdigest(), checksum.hexdigest())
