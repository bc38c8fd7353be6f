"""Which columns and classes a job reads: named or inferred, and checked without telling a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.catalog.bases import BaseModel
from app.catalog.chat_format import PROBLEMS as CHAT_PROBLEMS
from app.catalog.tasks import TASKS, Column, Task
from app.errors import InvalidRequest
from app.jobs import classes, told_languages
from app.jobs.facts import FileFacts
from app.jobs.schemas import TaskBlock

#: Tokens of a text that is to be written, where the request names no other number.
DEFAULT_TARGET_LENGTH = 128

#: Of a range of targets: its larger end, and its width as a share of that. A model's answers are float32.
_LARGEST, _NARROWEST = 1e30, 1e-4

_NO_IMAGES = "holds no images: they come as bytes in Parquet or Arrow, or in a zip."


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows are read.

    labels_source: `declared`, `file`: then the class list is stated as public, or `none`: the task has no classes.
    options: what the task takes besides, JSON-ready; `label_ids` where rows have a class's place among the labels in
      the place of its name.
    """

    task: Task
    columns: Mapping[str, str]
    labels: tuple[str, ...]
    labels_source: str
    max_length: int
    options: Mapping[str, Any]


def resolve(
    block: TaskBlock,
    base: BaseModel,
    training: FileFacts,
    validation: FileFacts | None,
    by_admin: bool,
    compare: Callable[[], None],
) -> Reading:
    """by_admin: whoever asks may declare any column's values public, as the class list. compare: as `class_list` has
    it; nothing that depends on the request alone is refused after it.

    Raises InvalidRequest: task_not_supported, column_not_found, missing_values, not_lists, labels_required and
    their like.
    """
    task = _task(block, base, training)
    columns = {
        role.role: _column(role, block.columns, training)
        for role in task.columns
        if role.required or role.role in block.columns or _inferred(role, training)
    }
    for role in block.columns:
        if role not in columns:
            raise InvalidRequest(
                "unknown_parameter",
                f"The roles of this task's columns are {', '.join(c.role for c in task.columns)}.",
                param="task.columns",
            )
    if len(set(columns.values())) != len(columns):
        raise InvalidRequest("column_not_found", "Each role needs a column of its own.", param="task.columns")
    files = [training] if validation is None else [training, validation]
    for file in files:
        _require_values(file, columns, task)
        _require_lengths(file, columns, task)
    options = _options(task, block, base, columns, files)
    if "target_lang" in task.options:
        told_languages.tell(block, base, columns, options, files)
    longest = block.max_length or min(task.max_length, base.max_length)
    if longest > base.max_length:
        raise InvalidRequest(
            "invalid_max_length", f"This base model reads at most {base.max_length} tokens.", param="task.max_length"
        )
    labels, source = classes.class_list(task, block, options, columns, files, by_admin, compare)
    return Reading(task, columns, labels, source, longest, options)


def _options(
    task: Task, block: TaskBlock, base: BaseModel, columns: Mapping[str, str], files: Sequence[FileFacts]
) -> dict[str, Any]:
    """What the request says of the task beyond what all tasks have, completed. Raises InvalidRequest."""
    options = block.options()
    for name in options:
        if name not in task.options:
            raise InvalidRequest(
                "unknown_parameter", f"The task `{task.type}` takes no `{name}`.", param=f"task.{name}"
            )
    if "multi_label" in task.options and "multi_label" not in options:
        # Lists of classes can mean nothing else.
        label = files[0].column(columns["label"]) or {}
        if label.get("type") == "json":
            options["multi_label"] = True
    if "range" in task.options:
        options["range"] = _range(options.get("range"), columns["target"], files)
    if "max_target_length" in task.options:
        longest = options.setdefault("max_target_length", min(DEFAULT_TARGET_LENGTH, base.max_length))
        if longest > base.max_length:
            raise InvalidRequest(
                "invalid_max_length",
                f"This base model writes at most {base.max_length} tokens.",
                param="task.max_target_length",
            )
    if "source_prefix" in task.options and task.type == "summarization" and base.family == "t5":
        options.setdefault("source_prefix", "summarize: ")  # as T5 was trained to (Raffel et al. 2020)
    return options


def _range(declared: list[float] | None, name: str, files: Sequence[FileFacts]) -> list[float]:
    """The declared range of targets; of a public training file, its own."""
    ranges: list[Sequence[float] | None] = [(file.column(name) or {}).get("range") for file in files]
    for file, values in zip(files, ranges, strict=True):
        if values is None:
            raise InvalidRequest(
                "target_not_a_number", "The column for `target` has cells that are no numbers.", param=file.param
            )
    if declared is None and not files[0].public:
        raise InvalidRequest(
            "range_required",
            "Declare task.range, the lowest and the highest target: their true extremes are somebody's own values.",
            param="task.range",
        )
    low, high = declared or ranges[0] or (0.0, 0.0)
    largest = max(abs(low), abs(high))
    if not low < high:
        raise InvalidRequest("invalid_range", "The range's first number must be below its second.", param="task.range")
    if largest > _LARGEST or high - low < max(1 / _LARGEST, _NARROWEST * largest):
        raise InvalidRequest(
            "invalid_range",
            "The model answers in 32 bits, which cannot tell the range's values apart.",
            param="task.range",
        )
    return [float(low), float(high)]


def _task(block: TaskBlock, base: BaseModel, training: FileFacts) -> Task:
    if block.type is not None:
        if block.type not in base.tasks or block.type not in TASKS:
            raise InvalidRequest(
                "task_not_supported", f"This base model can learn: {', '.join(base.tasks)}.", param="task.type"
            )
        return TASKS[block.type]
    known = [TASKS[name] for name in base.tasks if name in TASKS]
    if not known:
        raise InvalidRequest("task_not_supported", "This server trains no task on this base model.", param="model")
    # What the request says of a task counts before the names of the file's columns.
    options, named = block.options().keys(), block.columns.keys()
    meant = [
        task for task in known if options <= {*task.options} and named <= {role.role for role in task.columns}
    ] or known
    fitting = [
        task
        for task in meant
        if all(role.role in named or _inferred(role, training) for role in task.columns if role.required)
    ]
    return (fitting or meant)[0]


def _column(role: Column, named: Mapping[str, str], file: FileFacts) -> str:
    name = named.get(role.role) or _inferred(role, file)
    if name is None:
        # Column names stay out of it: the first line of a file without a header is a row.
        raise InvalidRequest(
            "column_not_found",
            f"The file has no column for `{role.role}` under a name this server knows ({', '.join(role.names)}); "
            f"name it in `task.columns.{role.role}`.",
            param=f"task.columns.{role.role}",
        )
    if file.column(name) is None:
        raise InvalidRequest(
            "column_not_found",
            f"The file has no column of the name given for `{role.role}`.",
            param=f"task.columns.{role.role}",
        )
    return name


def _inferred(role: Column, file: FileFacts) -> str | None:
    by_name = {str(column["name"]).lower(): str(column["name"]) for column in reversed(file.columns)}
    return next((by_name[name] for name in role.names if name in by_name), None)


def _require_values(file: FileFacts, columns: Mapping[str, str], task: Task) -> None:
    roles = {role.role: role for role in task.columns}
    for role, name in columns.items():
        column = file.column(name)
        if column is None:
            raise InvalidRequest(
                "column_not_found",
                f"The file has no column for `{role}` of the training file's name.",
                param=file.param,
            )
        nulls = column.get("nulls") or {}
        if nulls.get("count") and not roles[role].nullable:
            place = ", ".join(f"{kind} {nulls[kind]}" for kind in ("line", "row") if nulls.get(kind) is not None)
            raise InvalidRequest(
                "missing_values",
                f"The column for `{role}` has rows without a value" + (f", the first at {place}." if place else "."),
                param=file.param,
                **{kind: nulls.get(kind) for kind in ("line", "row")},
            )
        if nulls.get("count", 0) < file.num_rows:
            _require_format(file, column, roles[role])


def _require_format(file: FileFacts, column: Mapping[str, Any], role: Column) -> None:
    """Raises InvalidRequest, for a chat with the reader's reason and place."""
    is_image = column.get("type") == "image"
    if is_image != (role.holds == "images"):
        code, message = ("not_text", "is one of images.") if is_image else ("not_images", _NO_IMAGES)
        raise InvalidRequest(code, f"The column for `{role.role}` {message}", param=file.param)
    if role.holds in ("lists", "class_lists"):
        classes.require_lists(file, column["name"], role.role, integers=role.holds == "class_lists")
    if role.holds in ("messages", "tools"):
        _require_chat(file, column, role)


def _require_lengths(file: FileFacts, columns: Mapping[str, str], task: Task) -> None:
    """Raises InvalidRequest where lists that belong together are not of one length in some row."""
    for role in task.columns:
        if role.as_long_as is not None:
            pair = [file.column(columns[name]) or {} for name in (role.role, role.as_long_as)]
            own, others = (column.get("lists") for column in pair)
            if own is not None and others is not None and own != others:
                where = (pair[0].get("unequal") or {}).get(columns[role.as_long_as], {})
                raise InvalidRequest(
                    "lengths_differ",
                    _placed(where, f"The lists of `{role.role}` and `{role.as_long_as}` are not equally long."),
                    param=file.param,
                    **{kind: where.get(kind) for kind in ("line", "row")},
                )


def _placed(where: Mapping[str, Any], message: str) -> str:
    """The message behind the row's line and number, as far as they are known."""
    place = ", ".join(f"{kind} {where[kind]}" for kind in ("line", "row") if where.get(kind) is not None)
    return (f"{place[0].upper()}{place[1:]}: " if place else "") + message


def _require_chat(file: FileFacts, column: Mapping[str, Any], role: Column) -> None:
    found = column.get("chat") or {}
    code = "not_messages" if role.holds == "messages" else "not_tools"
    wrong = found.get("invalid") if found.get("holds") == role.holds else {"code": code}
    if wrong is not None:
        raise InvalidRequest(
            f"invalid_{role.holds}",
            _placed(wrong, CHAT_PROBLEMS[wrong["code"]]),
            param=file.param,
            **{kind: wrong.get(kind) for kind in ("line", "row")},
        )
