"""Errors that a user sees: each has a status, a fixed code and a message that never holds a private value.

`app.http.problems` renders them in the wire's envelope: {"error": {"message", "type", "param", "code", …}}.
"""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that cannot be answered. extra: further public keys of the envelope (what is left, for instance)."""

    status = 400
    type = "invalid_request_error"

    def __init__(self, code: str, message: str, *, param: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.extra = extra


class InvalidRequest(ApiError):
    """The request is wrong, and will be wrong again."""


class Unauthorized(ApiError):
    """No key, or one that is unknown, malformed or revoked."""

    status = 401
    type = "authentication_error"


class PermissionDenied(ApiError):
    """The key is good, its scopes do not reach."""

    status = 403
    type = "permission_error"


class NotFound(ApiError):
    """Missing and foreign objects answer alike."""

    status = 404
    type = "not_found_error"

    def __init__(self, kind: str, *, param: str | None = None, hint: str = "") -> None:
        said = f"No such {kind.replace('_', ' ')}."
        super().__init__(f"{kind}_not_found", f"{said} {hint}".strip(), param=param)


class Conflict(ApiError):
    """The object's state does not allow it. Never worth a retry: the answer says so to clients that retry 409."""

    status = 409
    type = "conflict_error"


class BudgetExceeded(ApiError):
    """The plan does not fit into the privacy budget. extra: epsilon_remaining and the nearest plan that fits."""

    status = 400
    type = "privacy_budget_error"


class PayloadTooLarge(ApiError):
    """More bytes than the server's setting allows."""

    status = 413


class ServiceUnavailable(ApiError):
    """Something that this server depends on does not answer; worth a retry."""

    status = 503
    type = "server_error"
