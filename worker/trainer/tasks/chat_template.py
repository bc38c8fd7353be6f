"""A chat as one text, and which parts of it the assistant wrote: by the base's own template, or by a plain one.

Templates are Jinja programs; transformers renders them in its ImmutableSandboxedEnvironment. They seldom say which
text is whose, so each turn of the assistant is found by telling the chat until just before it, and until just after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from app.catalog.chat_format import Message

#: Start and end of a part of a text, in characters.
Span = tuple[int, int]

#: For bases without a template; it goes into the bundle as chat_template.jinja. A turn is its speaker, a colon, a
#: space and the text; turns stand a blank line apart; a turn of the assistant ends with the end-of-text token.
PLAIN_TEMPLATE = """\
{%- set speakers = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"} -%}
{%- if tools %}{{ "Tools: " + (tools | tojson) + "\n\n" }}{% endif -%}
{%- for message in messages -%}
{%- if not loop.first %}{{ "\n\n" }}{% endif -%}
{{- speakers[message.role] + ":" -}}
{%- if message.content %}{{ " " + message.content }}{% endif -%}
{%- if message.tool_calls %}{{ " " + (message.tool_calls | map(attribute="function") | list | tojson) }}{% endif -%}
{%- if message.role == "assistant" and eos_token %}{{ eos_token }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "\n\nAssistant:" }}{% endif -%}
"""


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """`PLAIN_TEMPLATE`, behind the token that the tokenizer itself puts before every text, if it does."""
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{- bos_token -}}\n" if begins else "") + PLAIN_TEMPLATE


def tell(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
) -> tuple[str, list[Span]]:
    """The chat's text, and the spans in it that are targets: what the assistant says, its tool calls and the end of its
    turn, wherever the message is trained on.

    A chat that the template refuses (an order of roles that it does not know, for instance) is an empty text; a turn
    that stands in the whole chat otherwise than by itself has no span: neither is ever trained on wrongly.
    """
    try:
        text = _rendered(tokenizer, messages, tools)
        spans = [
            _span(tokenizer, messages, place, tools, text) for place, message in enumerate(messages) if message.trained
        ]
    except (TemplateError, TypeError, ValueError, KeyError):
        return "", []
    return text, [span for span in spans if span[0] < span[1]]


def _span(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    place: int,
    tools: Sequence[Mapping[str, Any]] | None,
    text: str,
) -> Span:
    """Of the assistant's message at `place`, in the whole chat's text; (0, 0) where it cannot be told for sure."""
    until = _rendered(tokenizer, messages[:place], tools) if place else ""
    asked = _rendered(tokenizer, messages[:place], tools, add_generation_prompt=True) if place else ""
    told = _rendered(tokenizer, messages[: place + 1], tools)
    start = _common(asked, told)
    if start < len(until) or not text.startswith(told[:start]):
        return (0, 0)
    turn = told[start:]
    if text.startswith(turn, start):
        return (start, start + len(turn))
    # Some templates leave out the thoughts of all turns but the last: then the rest of the turn is looked for.
    least = len(str(messages[place].fields["content"]).strip())
    beginning = text[start : start + min(least, 16)]
    skipped = turn.find(beginning, 1) if beginning else -1
    while 0 < skipped <= len(turn) - least:
        if text.startswith(turn[skipped:], start):
            return (start, start + len(turn) - skipped)
        skipped = turn.find(beginning, skipped + 1)
    return (0, 0)


def _common(one: str, other: str) -> int:
    """Characters that both texts begin with."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    rendered = tokenizer.apply_chat_template(
        [dict(message.fields) for message in messages],
        tools=[dict(tool) for tool in tools] if tools else None,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    assert isinstance(rendered, str)
    return rendered
