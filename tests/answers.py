"""Answers held against the API's own documentation, more strictly: no field that it does not name."""

from __future__ import annotations

import json
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
        self._validators: dict[tuple[str, str, str], Draft202012Validator] = {}

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

    def require(self, method: str, path: str, status: int, body: bytes) -> None:
        """AssertionError where a JSON answer of a documented route is not as its documentation says. Where an id that
        holds a slash could belong to several routes, one of them."""
        found = []
        for template in self._templates(unquote(path)):
            wrong = self._problems(template, method.lower(), status, body)
            if not wrong:
                return
            found.append((template, wrong[:5]))
        assert not found, (method, path, status, found)

    def _templates(self, path: str) -> list[str]:
        return [template for route, template in self._routes if route.fullmatch(path)]

    def _problems(self, template: str, method: str, status: int, body: bytes) -> list[Any]:
        if method not in self.paths[template]:
            return []
        responses = self.paths[template][method]["responses"]
        key = next((key for key in (str(status), f"{status // 100}XX") if key in responses), None)
        if key is None:
            return ["this status is not named"]
        content = responses[key].get("content", {})
        if "*/*" in content:
            return []
        if "application/json" not in content:
            return ["no JSON is named"]
        validator = self._validators.get((template, method, key))
        if validator is None:
            schema = {**_closed(content["application/json"]["schema"]), "components": self.components}
            validator = self._validators[template, method, key] = Draft202012Validator(schema)
        return [(list(error.absolute_path), error.message[:300]) for error in validator.iter_errors(json.loads(body))]


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
