"""The tasks that this service can train, and the columns each one reads.

A new task is an entry here and one file in `worker/trainer/tasks`; a contract test resolves every entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Column:
    """One role that a task reads from a dataset.

    names: column names, lower case, by which the role is inferred where the request names none, in order of preference.
    """

    role: str
    names: tuple[str, ...]
    required: bool = True


@dataclass(frozen=True, slots=True)
class Task:
    """An ML task.

    labelled: its classes are declared in the request, or taken from the file (then stated as public in the report).
    """

    type: str
    title: str
    columns: tuple[Column, ...]
    labelled: bool


_TEXT = Column("text", ("text", "sentence", "content", "message", "review", "comment", "body", "document"))
_LABEL = Column("label", ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic"))

TASKS: dict[str, Task] = {
    "text_classification": Task(
        type="text_classification", title="Text classification", columns=(_TEXT, _LABEL), labelled=True
    ),
}
