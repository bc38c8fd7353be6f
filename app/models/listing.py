"""The list of bases, in pages: by id, or in the order of a recommendation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.catalog.bases import BaseModel
from app.catalog.recommendation import Device, Recommendation, recommend
from app.catalog.tasks import TASKS
from app.errors import InvalidRequest
from app.http.pagination import PageParams
from app.settings import Settings

#: Of a question that says no number.
DEFAULT_UNITS = 10_000


@dataclass(frozen=True, slots=True)
class Question:
    """What a base is wanted for; None: this server's default. text_pair: whether a record has two texts."""

    task: str
    num_units: int | None = None
    epsilon: float | None = None
    device: Device | None = None
    text_pair: bool = False


def page_of(
    bases: Sequence[BaseModel], page: PageParams, asked: Question | None, settings: Settings
) -> tuple[list[tuple[BaseModel, Recommendation | None]], bool]:
    """One page, and whether more follow. Raises InvalidRequest: task_not_supported, invalid_after."""
    entries: list[tuple[BaseModel, Recommendation | None]]
    if asked is None:
        entries = [(base, None) for base in sorted(bases, key=lambda base: base.id)]
    else:
        entries = [(found.base, found) for found in _recommended(bases, asked, settings)]
    start = 0
    if page.after is not None:
        places = [place for place, (base, _) in enumerate(entries) if base.id == page.after]
        if not places:
            raise InvalidRequest("invalid_after", "`after` is not the id of an object in this list.", param="after")
        start = places[0] + 1
    return entries[start : start + page.limit], len(entries) > start + page.limit


def _recommended(bases: Sequence[BaseModel], asked: Question, settings: Settings) -> list[Recommendation]:
    if asked.task not in TASKS:
        raise InvalidRequest("task_not_supported", f"Tasks are {', '.join(TASKS)}.", param="task")
    if asked.text_pair and "text_pair" not in {column.role for column in TASKS[asked.task].columns}:
        raise InvalidRequest("invalid_request", f"The task `{asked.task}` reads no pairs of texts.", param="text_pair")
    # Where the hardware is not named it is the server's; `auto` is known to the workers alone.
    device: Device = asked.device or ("cuda" if settings.device == "cuda" else "cpu")
    epsilon = settings.default_epsilon if asked.epsilon is None else asked.epsilon
    return recommend(bases, asked.task, asked.num_units or DEFAULT_UNITS, epsilon, device, pairs=asked.text_pair)
