"""Lists of classes that keys without the scope `admin` declare: how much of a private column they can tell."""

from __future__ import annotations

from typing import Any

from fastapi.testclient import TestClient

from app.auth import service as auth
from app.auth.service import Caller
from app.db.session import Database
from app.files.limits import MAX_LABEL_LISTS
from tests.app.jobs.conftest import MODEL
from tests.app.jobs.test_routes import JOBS, MakeFile, key


def test_no_key_finds_out_a_columns_values_by_declaring_lists_of_them(
    client: TestClient, make_file: MakeFile, database: Database, caller: Caller
):
    """Each list tells, at no ε, whether it holds all values. Dropped one by one from a list of all that could be, they
    would show each that is there, a single person's too."""
    ages = ["17", "45", "103"]
    text = {"name": "text", "type": "text", "distinct": 1990, "classes": None, "nulls": None}
    file = make_file(columns=[text, {"name": "age", "type": "text", "distinct": 3, "classes": ages, "nulls": None}])
    with database.writing() as session:
        _, token = auth.create_key(session, caller.project_id, "analyst", ["submit"])

    def asked(labels: list[str], headers: dict[str, str], path: str = "/estimate", **change: Any) -> str | None:
        task = {"type": "text_classification", "columns": {"label": "age"}, "labels": labels, **change}
        answer = client.post(JOBS + path, json={"model": MODEL, "training_file": file, "task": task}, headers=headers)
        return None if answer.status_code == 200 else answer.json()["error"]["code"]

    could_be = [str(age) for age in range(120)]
    analyst, found = key(token), {}
    for number in range(MAX_LABEL_LISTS + 1):  # refused whatever the rows are: tells nothing of them, and costs nothing
        assert asked([f"{number}", f"{number}"], analyst) == "invalid_labels"
        assert asked([f"{number}", "b"], analyst, max_length=100_000) == "invalid_max_length"
        assert asked([f"{number}", "b"], analyst, type="masked_lm") == "task_not_supported"
        assert asked([f"{number}", "b"], analyst, columns={"label": "none"}) == "column_not_found"
    for age in reversed(could_be):
        found[age] = asked([other for other in could_be if other != age], analyst)
    told = [age for age, code in found.items() if code != "too_many_label_lists"]
    assert len(told) == MAX_LABEL_LISTS
    assert [age for age in told if found[age] == "label_not_declared"] == ["103"]
    assert asked(ages, analyst, "") == "too_many_label_lists"
    assert asked(list(reversed([age for age in could_be if age != "119"])), analyst) is None  # declared before
    assert asked(ages, {}) is None  # the admin
