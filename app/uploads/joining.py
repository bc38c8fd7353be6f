"""Joins the parts of an upload to the bytes of one file: piece by piece, in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from starlette.concurrency import iterate_in_threadpool

from app.errors import InvalidRequest
from app.storage import Storage


async def join(storage: Storage, keys: Sequence[str], target: str, md5: str | None) -> str:
    """Stores the objects' bytes, in order, under `target`; their SHA-256 in hexadecimal.

    md5: what they must have, in hexadecimal; InvalidRequest `md5_mismatch` else. FileNotFoundError where a part is
    gone. Where it raises, nothing is stored.
    """
    sha256, checksum = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

    def pieces() -> Iterator[bytes]:  # in threads, hashing included
        for key in keys:
            for piece in storage.stream(key):
                sha256.update(piece)
                if md5 is not None:
                    checksum.update(piece)
                yield piece

    async with storage.put_stream(target) as writer:
        async for piece in iterate_in_threadpool(pieces()):
            await writer.write(piece)
        if md5 is not None and checksum.hexdigest() != md5.lower():
            raise InvalidRequest("md5_mismatch", "The parts do not have this MD5, in this order.", param="md5")
    return sha256.hexdigest()
