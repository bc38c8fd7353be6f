"""Published models, as a worker publishes them."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from app.db.session import Database
from app.ids import new_id
from app.models import archives, service
from app.settings import Settings
from app.storage import open_storage

Bundle = dict[str, bytes]

BUNDLE: Bundle = {
    "README.md": b"# A model\n",
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 1031,
    "privacy_report.json": b"",
    "tokenizer.json": b"x" * 512,
}


def described(bundle: Bundle) -> list[dict[str, Any]]:
    return [
        {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "crc32": zlib.crc32(data)}
        for path, data in bundle.items()
    ]


@pytest.fixture
def publish(database: Database, settings: Settings, project_id: str) -> Callable[..., str]:
    """Stores a bundle and publishes it; the model's id."""

    def run(bundle: Bundle = BUNDLE, suffix: str | None = "mine", project: str = project_id) -> str:
        job_id = new_id("ftjob")
        prefix = f"projects/{project}/models/{job_id}/1"
        storage = open_storage(settings.storage)
        for path, data in bundle.items():
            storage.put_bytes(f"{prefix}/{path}", data)
        files = described(bundle)
        with database.writing() as session:
            return service.publish(
                session,
                project_id=project,
                job_id=job_id,
                base="all-MiniLM-L6-v2",
                suffix=suffix,
                storage_prefix=prefix,
                files=files,
                archives=archives.describe(files, lambda path: iter([bundle[path]])),
                metrics={"accuracy": 0.9},
                privacy_report=json.loads('{"epsilon": 3.0}'),
            ).id

    return run
