"""Keyset pages: every row once, in order, whatever is added meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.auth.tables import Project
from app.db.session import Database
from app.errors import InvalidRequest
from app.http.deps import Reader, Reading
from app.http.pagination import Page, PageParams, list_response, paginate

router = APIRouter()


@router.get("/probe/projects")
def projects(session: Reading, caller: Reader, page: Page) -> dict[str, object]:
    rows, has_more = paginate(session, select(Project).where(Project.name.like("p%")), Project, page)
    return list_response([row.id for row in rows], has_more)


@pytest.fixture
def client(app: FastAPI, client: TestClient) -> TestClient:
    app.include_router(router)
    return client


@pytest.fixture
def add(database: Database) -> Callable[[int], str]:
    def add(number: int) -> str:
        with database.writing() as session:
            # Three rows a second: ties of the sort column.
            session.add(Project(id=f"proj-{number:03}", name=f"p{number}", created_at=float(number // 3)))
        return f"proj-{number:03}"

    return add


def test_pages_hold_every_row_once_newest_first(client: TestClient, add: Callable[[int], str]) -> None:
    expected = [add(number) for number in range(7)][::-1]
    found: list[str] = []
    after: dict[str, str] = {}
    while True:
        answer = client.get("/probe/projects", params={"limit": 3, **after}).json()
        assert answer["object"] == "list"
        found += answer["data"]
        if not answer["has_more"]:
            break
        after = {"after": answer["data"][-1]}
        add(100 + len(found))  # newer than the page: not seen
    assert found == expected


def test_the_last_page_says_so_even_when_full(client: TestClient, add: Callable[[int], str]) -> None:
    ids = [add(number) for number in range(4)]
    first = client.get("/probe/projects", params={"limit": 2, "order": "asc"}).json()
    assert (first["data"], first["has_more"]) == (ids[:2], True)
    last = client.get("/probe/projects", params={"limit": 2, "order": "asc", "after": ids[1]}).json()
    assert (last["data"], last["has_more"]) == (ids[2:], False)
    assert client.get("/probe/projects", params={"after": ids[0]}).json() == {
        "object": "list",
        "data": [],
        "has_more": False,
    }


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}, {"after": "x" * 129}])
def test_parameters_out_of_range_are_refused(client: TestClient, query: dict[str, str]) -> None:
    response = client.get("/probe/projects", params=query)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(query))


def test_an_unknown_after_is_refused(client: TestClient, project_id: str) -> None:
    for after in ("proj-none", project_id):  # the second exists, but not in this list
        response = client.get("/probe/projects", params={"after": after})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_after")


@pytest.mark.every_database
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_another_column_may_sort_with_ties(database: Database, add: Callable[[int], str], order: str) -> None:
    expected = [add(number) for number in range(8)]
    if order == "desc":
        expected.reverse()
    found: list[str] = []
    with database.reading() as session:
        more, after = True, None
        while more:
            page = PageParams(after, 2, order)
            rows, more = paginate(session, select(Project), Project, page, key=Project.created_at)
            found += [row.id for row in rows]
            after = found[-1]
        assert found == expected
        with pytest.raises(InvalidRequest):
            paginate(session, select(Project), Project, PageParams("none"), key=Project.created_at)
