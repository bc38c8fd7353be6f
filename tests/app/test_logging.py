"""Logs are JSON lines with ids; an exception's text, which may quote a row, is never among them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_PROGRAM = """
import logging
import structlog
from app.logging import configure

configure("info")
log = structlog.get_logger("app.probe")

def fail():
    raise ValueError("Zymurgy-4711")

with structlog.contextvars.bound_contextvars(request_id="req-1"):
    log.info("started", job_id="ftjob-1")
    log.debug("too fine")
try:
    fail()
except ValueError:
    log.exception("failed")
    logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
logging.getLogger("uvicorn.access").info("GET /v1/files?metadata[name]=Zymurgy-4711")
logging.getLogger("somewhere").warning("%s of %s", 1, 2)
"""


def _lines() -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "Zymurgy" not in done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_every_line_is_json_without_exception_texts() -> None:
    started, failed, foreign, library = _lines()
    assert (started["event"], started["request_id"], started["job_id"]) == ("started", "req-1", "ftjob-1")
    assert (started["level"], started["logger"]) == ("info", "app.probe")
    assert started["timestamp"].endswith("Z")
    for line in (failed, foreign):
        assert line["error"] == "ValueError"
        assert line["frames"][-1].endswith("fail")
        assert line["level"] == "error"
    assert library["event"] == "1 of 2"
