"""A bucket to upload to."""

from tests.app.storage.conftest import s3, s3_endpoint

__all__ = ["s3", "s3_endpoint"]
