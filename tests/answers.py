"""Answers held against the API's own documentation, more strictly: no field that it does not name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator


class Documentation:
    """An OpenAPI document, as answers have to be."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.paths: Mapping[str, Any] = document["paths"]
        self.components = _closed(document["components"])
        self.checked: set[tuple[str, str]] = set()
        self._validators: dict[str, Draft202012Validator] = {}

    @cached_property
    def _routes(self) -> list[tuple[re.Pattern[str], str]]:
        """As the server looks them up: in order, and `{id}` may hold a slash only where the route says so."""
        loose = ("model_id", "base_model_id", "path")

        def pattern(path: str) -> str:
            parts = re.split(r"\{(\w+)\}", path)
            return "".join(
                re.escape(part) if number % 2 == 0 else "(.+)" if part in loose else "([^/]+)"
                for number, part in enumerate(parts)
            )

        return [(re.compile(pattern(path)), path) for path in self.paths]

    def require(self, method: str, path: str, status: int, media: str, body: Any) -> None:
        """AssertionError where a JSON answer of a documented route is not as its documentation says."""
        template = next((template for route, template in self._routes if route.fullmatch(unquote(path))), None)
        operation = self.paths.get(template, {}).get(method.lower())
        if operation is None or media != "application/json":
            return
        responses = operation["responses"]
        told = responses.get(str(status)) or responses.get(f"{status // 100}XX")
        assert told is not None, (method, template, status)
        if "*/*" in told.get("content", {}):
            return
        assert "application/json" in told.get("content", {}), (method, template, status)
        schema = told["content"]["application/json"]["schema"]
        key = f"{method} {template} {status if str(status) in responses else 'error'}"
        if key not in self._validators:
            self._validators[key] = Draft202012Validator({**_closed(schema), "components": self.components})
        wrong = sorted(self._validators[key].iter_errors(body), key=lambda error: len(error.absolute_path))
        assert not wrong, (key, [(list(error.absolute_path), error.message[:300]) for error in wrong[:5]])
        self.checked.add((method.upper(), str(template)))


def _closed(schema: Any) -> Any:
    """The schema, of which an object has no property that is not named, unless it says so."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and "type" in closed:
        closed.setdefault("additionalProperties", False)
    return closed
