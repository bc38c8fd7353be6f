"""Around every request: an id, one line in the log, an answer even to a mistake of ours, a limit to its body."""

from __future__ import annotations

import re
import time

import structlog
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.http.problems import unexpected
from app.ids import sortable_token

log = structlog.get_logger("app.access")

#: Bytes of a body that is no upload.
MAX_BODY = 2**20

#: A proxy's request id is taken over when it is plainly an id.
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")


class RequestEnvelope:
    """ASGI middleware. The innermost place that sees every answer, and the outermost that can still give one.

    streamed: matches paths whose routes take bodies of any size piece by piece. Every other body is held in memory as
    a whole, and is so before the caller is known.
    """

    def __init__(self, app: ASGIApp, streamed: re.Pattern[str]) -> None:
        self.app = app
        self.streamed = streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{sortable_token()}"
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                limited = receive if self.streamed.fullmatch(scope["path"]) else _limit(receive)
                await self.app(scope, limited, send_with_id)
            except Exception:
                log.exception("request_failed", **_about(scope))
                if status is None:
                    await unexpected()(scope, receive, send_with_id)
                # An answer that has begun is cut off by the server, which notices that it was never finished.
            finally:
                duration = round(1000 * (time.monotonic() - started), 1)
                log.info("request", status=status, milliseconds=duration, **_about(scope))


def _limit(receive: Receive) -> Receive:
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY:
            raise HTTPException(413)
        return message

    return counted


def _about(scope: Scope) -> dict[str, str | None]:
    """Method, route and caller: ids only. The template of the path, since the path itself is the client's text."""
    caller = scope.get("state", {}).get("caller")
    return {
        "method": scope["method"],
        "route": getattr(scope.get("route"), "path", None),
        "project_id": caller and caller.project_id,
        "key_id": caller and caller.key_id,
    }
