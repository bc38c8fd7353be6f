"""OpenAI's chat format: what is read of a cell, what is refused and why, and where the owner is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.catalog.chat_format import MAX_DEPTH, InvalidChat, read_messages, read_tools
from tests.app.files.reading import read_profile

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"x": 1}'}}


def test_messages_are_read_as_templates_expect_them() -> None:
    cell = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {**USER, "name": "jo", "timestamp": 1},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        ASSISTANT,
    ]
    messages = read_messages(json.dumps(cell))
    assert [message.trained for message in messages] == [False, False, False, False, True]
    assert [dict(message.fields) for message in messages] == [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "hi", "name": "jo"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "look", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "c"},
        {"role": "assistant", "content": "ho"},
    ]


@pytest.mark.parametrize(
    ("cell", "code"),
    [
        ("no json", "not_messages"),
        ({"role": "user"}, "not_messages"),
        ([], "not_messages"),
        (["hi"], "not_messages"),
        ([USER], "no_assistant_message"),
        ([{"role": "nurse", "content": "hi"}, ASSISTANT], "role_unknown"),
        ([{"role": ["user"], "content": "hi"}, ASSISTANT], "role_unknown"),
        ([{"content": "hi"}, ASSISTANT], "role_unknown"),
        ([{"role": "user"}, ASSISTANT], "content_missing"),
        ([{"role": "user", "content": 3}, ASSISTANT], "content_not_text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ASSISTANT], "content_not_text"),
        ([USER, {**ASSISTANT, "weight": 0.5}], "weight_invalid"),
        ([{**USER, "weight": 0}, ASSISTANT], "weight_invalid"),
        ([USER, {**ASSISTANT, "tool_calls": []}], "tool_call_invalid"),
        ([USER, {**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "tool_call_invalid"),
        ([USER, {**ASSISTANT, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}], "tool_call_invalid"),
        ([USER, {**ASSISTANT, "tool_calls": [{"function": {"arguments": "{}"}}]}], "tool_call_invalid"),
        ([{**USER, "tool_calls": [CALL]}, ASSISTANT], "tool_call_invalid"),
    ],
)
def test_what_is_wrong_has_a_code(cell: Any, code: str) -> None:
    with pytest.raises(InvalidChat) as refused:
        read_messages(cell if isinstance(cell, str) else json.dumps(cell))
    assert refused.value.code == code


def test_deep_nesting_is_no_chat() -> None:
    with pytest.raises(InvalidChat):
        read_messages("[" * 100_000)


def nested(levels: int) -> Any:
    """Objects in one another."""
    return {} if levels == 1 else {"a": nested(levels - 1)}


def test_levels_are_bounded_wherever_they_stand() -> None:
    """Far below Python's own limit, which a template would meet later: in the job, at the price of the whole of it."""
    for levels, refused in ((MAX_DEPTH, False), (MAX_DEPTH + 1, True)):
        call = {"function": {"name": "f", "arguments": json.dumps(nested(levels))}}
        arguments = json.dumps([USER, {**ASSISTANT, "tool_calls": [call]}])
        key = json.dumps([USER, {**ASSISTANT, "other": nested(levels - 2)}])  # within a list and a message
        tool = {"type": "function", "function": {"name": "look", "parameters": nested(levels - 3)}}
        for read, cell in ((read_messages, arguments), (read_messages, key), (read_tools, json.dumps([tool]))):
            if not refused:
                read(cell)
                continue
            with pytest.raises(InvalidChat) as caught:
                read(cell)
            assert caught.value.code == "too_deep"


def test_tools_have_names() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    assert read_tools(json.dumps([tool])) == [tool]
    with pytest.raises(InvalidChat):
        read_tools(json.dumps([{"type": "function"}]))


@pytest.mark.parametrize(
    ("second", "invalid"),
    [
        ([USER, ASSISTANT], None),
        ([USER], {"code": "no_assistant_message", "row": 2, "line": 3}),
        ("text", {"code": "not_messages", "row": 2, "line": 3}),
    ],
)
def test_the_profile_says_where_a_chat_is_wrong(tmp_path: Path, second: Any, invalid: dict[str, Any] | None) -> None:
    lines = [json.dumps({"messages": [USER, ASSISTANT]}), "", json.dumps({"messages": second})]
    (column,) = read_profile(tmp_path, "\n".join(lines).encode(), "a.jsonl")["columns"]
    assert column["chat"] == {"holds": "messages", "invalid": invalid}


def test_lists_of_other_objects_are_no_chats(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"x": [{"a": 1}], "y": ["a"], "z": "[1"}) for _ in range(2))
    columns = read_profile(tmp_path, lines.encode(), "a.jsonl")["columns"]
    assert [column["chat"] for column in columns] == [None, None, None]
