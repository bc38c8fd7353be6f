"""Whether this process lives, and whether what it depends on answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from sqlalchemy import text

from app.db.session import Database

router = APIRouter(tags=["health"])
log = structlog.get_logger(__name__)


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"description": "Something does not answer; `checks` says what."}})
def readyz(request: Request) -> JSONResponse:
    """The database answers, the object store takes an object (a full disk does not), and the broker answers."""
    state = request.app.state
    checks = {
        "database": _answers("database", lambda: _ask(state.database)),
        "storage": _answers("storage", lambda: state.storage.put_bytes("health/probe", b"ok")),
        "broker": _answers("broker", state.queue.ping),
    }
    ready = all(checks.values())
    body: dict[str, Any] = {
        "status": "ready" if ready else "not_ready",
        "checks": {name: "ok" if good else "failed" for name, good in checks.items()},
    }
    return JSONResponse(body, status_code=200 if ready else 503)


def _answers(name: str, ask: Callable[[], object]) -> bool:
    try:
        ask()
    except Exception:  # whatever a driver raises, the answer is the same
        log.warning("not_ready", dependency=name, exc_info=True)
        return False
    return True


def _ask(database: Database) -> None:
    with database.reading() as session:
        session.execute(text("SELECT 1"))
