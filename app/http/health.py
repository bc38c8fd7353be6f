"""Whether this process lives, and whether what it depends on answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import structlog
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from sqlalchemy import text

from app.db.session import Database

router = APIRouter(tags=["health"])
log = structlog.get_logger(__name__)


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


class Readiness(BaseModel):
    """What answers, and whether all of it does."""

    status: Literal["ready", "not_ready"]
    checks: dict[Literal["database", "storage", "broker"], Literal["ok", "failed"]]


@router.get(
    "/readyz", responses={503: {"model": Readiness, "description": "Something does not answer; `checks` says what."}}
)
def readyz(request: Request, response: Response) -> Readiness:
    """The database answers, the object store takes an object (a full disk does not), and the broker answers."""
    state = request.app.state
    ready = {
        "database": _answers("database", lambda: _ask(state.database)),
        "storage": _answers("storage", lambda: state.storage.put_bytes("health/probe", b"ok")),
        "broker": _answers("broker", state.queue.ping),
    }
    response.status_code = 200 if all(ready.values()) else 503
    return Readiness.model_validate(
        {
            "status": "ready" if all(ready.values()) else "not_ready",
            "checks": {name: "ok" if good else "failed" for name, good in ready.items()},
        }
    )


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
