"""A bucket to upload to, and uploads that are begun."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types import Upload

from tests.app.storage.conftest import s3, s3_endpoint
from tests.app.uploads.parts import DATA

__all__ = ["s3", "s3_endpoint"]


@pytest.fixture
def begin(openai_client: openai.OpenAI) -> Callable[..., Upload]:
    """Begins an upload of DATA, or of so many bytes."""

    def create(size: int = len(DATA), **extra: Any) -> Upload:
        return openai_client.uploads.create(
            bytes=size, filename="patients.csv", mime_type="text/csv", purpose="fine-tune", extra_body=extra
        )

    return create
