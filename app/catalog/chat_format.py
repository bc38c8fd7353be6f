"""OpenAI's chat format for fine-tuning, as cells hold it: a JSON list of messages, and a JSON list of tools.

https://platform.openai.com/docs/guides/supervised-fine-tuning: roles, tool calls with their arguments as JSON text,
`weight` 0 or 1 on a message of the assistant. Content is text, or a list of text parts. Keys that are not listed here
are not read. The reader checks every cell before a job can be; the trainer reads it by the same function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: What a column of JSON cells may hold.
Holds = Literal["messages", "tools"]

#: What is wrong with a cell: fixed words, never one of its own.
PROBLEMS: dict[str, str] = {
    "not_messages": "A chat is a JSON list of objects, each with a role.",
    "role_unknown": "A role is none of system, developer, user, assistant and tool.",
    "content_missing": "A message has no content.",
    "content_not_text": "Content is neither text nor a list of text parts.",
    "weight_invalid": "A weight is neither 0 nor 1, or is not on a message of the assistant.",
    "tool_call_invalid": "A tool call has no function name, or arguments that are no JSON object.",
    "no_assistant_message": "A chat has no message of the assistant: nothing could be learnt from it.",
    "not_tools": "Tools are a JSON list of {type: function, function: {name, …}}.",
    "too_deep": "Lists and objects stand more than 64 deep in one another.",
}

#: Levels of lists and objects in a cell: templates, and what renders them, walk through each by a call of its own.
MAX_DEPTH = 64

_ROLES = ("system", "developer", "user", "assistant", "tool")


class InvalidChat(ValueError):
    """A cell is not of the format. code: of `PROBLEMS`."""

    def __init__(self, code: str) -> None:
        super().__init__(PROBLEMS[code])
        self.code = code


@dataclass(frozen=True, slots=True)
class Message:
    """fields: what a chat template reads. trained: whether its tokens are targets."""

    fields: Mapping[str, Any]
    trained: bool


def read_messages(cell: str) -> tuple[Message, ...]:
    """The messages of one cell. Raises InvalidChat."""
    value = _list_of_objects(cell, "not_messages")
    messages = tuple(_message(entry) for entry in value)
    if not any(message.fields["role"] == "assistant" for message in messages):
        raise InvalidChat("no_assistant_message")
    return messages


def read_tools(cell: str) -> list[dict[str, Any]]:
    """The tools of one cell. Raises InvalidChat."""
    tools = _list_of_objects(cell, "not_tools")
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidChat("not_tools")
    return tools


READERS: dict[Holds, Callable[[str], object]] = {"messages": read_messages, "tools": read_tools}


def looks_like(cell: str) -> Holds | None:
    """What a column may be whose first cell this is."""
    try:
        value = json.loads(cell) if cell.startswith("[") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    return "messages" if "role" in value[0] else "tools" if "function" in value[0] else None


def _list_of_objects(cell: str, code: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        raise InvalidChat(code) from None
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise InvalidChat(code)
    _require_shallow(value)
    return value


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if any(isinstance(inner, dict | list) for inner in level):
        raise InvalidChat("too_deep")


def _message(entry: Mapping[str, Any]) -> Message:
    role, weight, calls = entry.get("role"), entry.get("weight"), entry.get("tool_calls")
    if role not in _ROLES:
        raise InvalidChat("role_unknown")
    if weight is not None and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        raise InvalidChat("weight_invalid")
    # Templates know the older word only.
    fields: dict[str, Any] = {"role": "system" if role == "developer" else role}
    if calls is not None:
        if role != "assistant" or not isinstance(calls, list) or not calls:
            raise InvalidChat("tool_call_invalid")
        fields["tool_calls"] = [_tool_call(call) for call in calls]
    content = entry.get("content")
    if content is None and calls is None:
        raise InvalidChat("content_missing")
    fields["content"] = "" if content is None else _text(content)
    for key in ("name", "tool_call_id"):
        if isinstance(entry.get(key), str):
            fields[key] = entry[key]
    return Message(fields, role == "assistant" and weight != 0)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for part in content if isinstance(content, list) else [None]:
        match part:
            case {"type": "text", "text": str(text)}:
                parts.append(text)
            case _:
                raise InvalidChat("content_not_text")
    return "".join(parts)


def _tool_call(call: Any) -> dict[str, Any]:
    """With its arguments as an object, which is what templates expect."""
    match call:
        case {"function": {"name": str(name), "arguments": arguments}}:
            pass
        case _:
            raise InvalidChat("tool_call_invalid")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        raise InvalidChat("tool_call_invalid") from None
    if not isinstance(arguments, dict):
        raise InvalidChat("tool_call_invalid")
    _require_shallow(arguments)
    told = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**told, "type": "function", "function": {"name": name, "arguments": arguments}}
