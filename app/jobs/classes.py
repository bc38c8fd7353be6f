"""The classes of a job: declared, or taken from its file and then public; by name in its rows, or by number."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from app.catalog.tasks import Task
from app.errors import InvalidRequest
from app.jobs.facts import FileFacts
from app.jobs.schemas import TaskBlock

#: Of a private file, this many values at most are taken as a public class list; more are declared.
MAX_CLASSES_FROM_FILE = 200

#: As Hugging Face datasets have classes in their rows, with the names beside them.
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,8})")


def class_list(
    task: Task,
    block: TaskBlock,
    options: dict[str, Any],
    columns: Mapping[str, str],
    files: Sequence[FileFacts],
    by_admin: bool,
    compare: Callable[[], None],
) -> tuple[tuple[str, ...], str]:
    """The job's classes, and where they come from. Where rows have numbers and the declared labels are names, a number
    is the place of one of these, from 0, and `options` say `label_ids`. files: the training file first.

    compare: called before the declared labels are compared with rows, whose answer tells of them; not where they are
    refused for what they are themselves.

    Raises InvalidRequest: labels_required, invalid_labels, too_many_classes, label_not_declared, one_class_only; and
    what `compare` does.
    """
    if task.class_role is None:
        if block.labels is not None:
            raise InvalidRequest("unknown_parameter", f"The task `{task.type}` has no classes.", param="task.labels")
        return (), "none"
    name, training = columns[task.class_role], files[0]
    if block.labels is None and not by_admin:
        _require_class_column(task, name, training)
    kind = "elements" if task.class_elements or options.get("multi_label") else "classes"
    if kind == "elements":
        for file in files:
            require_lists(file, name, task.class_role, integers=True)
    found = [_classes(file, name, kind) for file in files]
    if block.labels is None:
        labels = _from_file(task, training, found[0])
    else:
        labels = tuple(block.labels)
        if len(labels) < 2 or len(set(labels)) != len(labels):
            raise InvalidRequest("invalid_labels", "Labels are at least two, each once.", param="task.labels")
        compare()
        if not any(map(_is_number, labels)) and all(map(_are_numbers, found)):
            options["label_ids"] = True
    _require_declared(files, found, range(len(labels)) if "label_ids" in options else labels)
    if len(found[0] or ()) < 2:
        raise InvalidRequest(
            "one_class_only", "Every row has the same class: there is nothing to learn.", param=training.param
        )
    return labels, "file" if block.labels is None else "declared"


def require_lists(file: FileFacts, name: str, role: str, *, integers: bool) -> None:
    """Raises InvalidRequest `not_lists` where not every cell is a list of strings, or, if they may be, of integers."""
    column = file.column(name) or {}
    # Files that were read before this was looked at say nothing of it.
    if column.get("lists", "unknown") is None or (column.get("list_items") == "integers" and not integers):
        items = "strings, nor each one of integers" if integers else "strings"
        raise InvalidRequest(
            "not_lists", f"The column for `{role}` has rows that are no JSON list of {items}.", param=file.param
        )


def _classes(file: FileFacts, name: str, kind: str) -> Sequence[str] | None:
    """The distinct classes of a column, as far as the reader kept them. kind: `classes`, or `elements` of lists."""
    classes: Sequence[str] | None = (file.column(name) or {}).get(kind)
    return classes


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def _are_numbers(classes: Sequence[str] | None) -> bool:
    return classes is not None and all(map(_is_number, classes))


def _require_class_column(task: Task, name: str, training: FileFacts) -> None:
    """Any column may be named as the label; its values become public only where the owner named it for classes.

    Otherwise a job on a column of addresses would list them. Raises labels_required before a value is looked at.
    """
    (role,) = (column for column in task.columns if column.role == task.class_role)
    if not training.public and name.lower() not in role.names:
        raise InvalidRequest(
            "labels_required",
            "Declare task.labels, or submit with an admin key: this column's values are not taken as a public class "
            "list.",
            param="task.labels",
        )


def _from_file(task: Task, training: FileFacts, classes: Sequence[str] | None) -> tuple[str, ...]:
    """In the order of their numbers, where they are numbers."""
    if classes is None or (len(classes) > MAX_CLASSES_FROM_FILE and not training.public):
        raise InvalidRequest(
            "too_many_classes",
            f"The column for `{task.class_role}` has too many or too long values to be classes; is it the right one? "
            "If so, declare task.labels.",
            param=f"task.columns.{task.class_role}",
        )
    return tuple(sorted(classes, key=int) if _are_numbers(classes) else classes)


def _require_declared(
    files: Sequence[FileFacts], found: Sequence[Sequence[str] | None], labels: Sequence[str] | range
) -> None:
    """labels: as rows have them, names or numbers."""
    known = set(map(str, labels))
    for file, classes in zip(files, found, strict=True):
        if classes is None or not set(classes) <= known:
            where = "`task.labels`" if file.param == "training_file" else "the job's labels"
            number = ", or not the number of one, counted from 0" if isinstance(labels, range) else ""
            raise InvalidRequest(
                "label_not_declared", f"A row's class is not one of {where}{number}.", param=file.param
            )
