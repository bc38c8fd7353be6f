"""A file that comes in parts, and what is asked of it again and again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Upload

from app.settings import Settings

DATA = b"text,label,patient\n" + b"".join(b"words %d,%d,p%d\n" % (n, n % 2, n % 7) for n in range(60))
MD5 = hashlib.md5(DATA).hexdigest()


def stored(settings: Settings, kind: str) -> list[Path]:
    return [path for path in (settings.data_dir / "storage").rglob("*") if path.is_file() and kind in path.parts]


def send(client: openai.OpenAI, upload: Upload, *pieces: bytes) -> list[str]:
    return [client.uploads.parts.create(upload.id, data=piece).id for piece in pieces]


def refused(code: str, kind: type[openai.APIStatusError], call: Callable[[], object]) -> Any:
    with pytest.raises(kind) as caught:
        call()
    assert caught.value.code == code
    return caught.value
