"""Lists of the wire: keyset pages, where `after` is the last id that the client has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Depends, Query
from sqlalchemy import Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.errors import InvalidRequest

Row = TypeVar("Row")


@dataclass(frozen=True)
class PageParams:
    """Which part of a list is asked for."""

    after: str | None = None
    limit: int = 20
    order: Literal["asc", "desc"] = "desc"


async def page_params(
    after: Annotated[str | None, Query(max_length=128, description="The last id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="By creation: `desc` is newest first.")] = "desc",
) -> PageParams:
    """The wire's list parameters."""
    return PageParams(after, limit, order)


Page = Annotated[PageParams, Depends(page_params)]


def paginate(
    session: Session,
    statement: Select[Row],
    model: Any,
    page: PageParams,
    key: InstrumentedAttribute[Any] | None = None,
) -> tuple[list[Row], bool]:
    """One page of a readable statement over `model`, and whether more rows follow.

    key: the column to sort by, ties broken by the id; without it the id alone, which sorts by creation.
    InvalidRequest when `after` is not a row that the statement reads.
    """
    by = (model.id,) if key is None else (key, model.id)
    if page.after is not None:
        last = session.execute(statement.with_only_columns(*by).where(model.id == page.after)).one_or_none()
        if last is None:
            raise InvalidRequest("invalid_after", "`after` is not the id of an object in this list.", param="after")
        position = tuple_(*by)
        cursor = tuple_(*last)
        statement = statement.where(position < cursor if page.order == "desc" else position > cursor)
    ordering = [column.desc() if page.order == "desc" else column.asc() for column in by]
    rows = list(session.scalars(statement.order_by(*ordering).limit(page.limit + 1)))
    return rows[: page.limit], len(rows) > page.limit


def list_response(rows: Sequence[Any], has_more: bool) -> dict[str, Any]:
    """The wire's list of objects that are rendered already."""
    return {"object": "list", "data": list(rows), "has_more": has_more}
