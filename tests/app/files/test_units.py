"""Privacy units by column: what an upload declares, what is counted, and that the same rows keep their unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

from app.db.session import Database
from app.files import service
from app.files.tables import File
from tests.app.files.conftest import Upload

DATA = b"text,label,patient_id\ngood,pos,anna\nbad,neg,anna\nfine,pos,ben\nworse,neg,anna\n"
LINES = (
    b'{"text": "good", "label": "pos", "patient_id": "anna"}\n{"text": "bad", "label": "neg", "patient_id": "anna"}\n'
    b'{"text": "fine", "label": "pos", "patient_id": "ben"}\n{"text": "worse", "label": "neg", "patient_id": "anna"}\n'
)
UNIT = {"column": "patient_id"}

Process = Callable[[str], dict[str, Any]]


@pytest.fixture
def try_upload(client: TestClient) -> Callable[..., httpx.Response]:
    """An upload that may be refused."""

    def send(data: bytes = DATA, filename: str = "data.csv", **fields: str) -> httpx.Response:
        return client.post("/v1/files", files={"file": (filename, data)}, data={"purpose": "fine-tune", **fields})

    return send


def code(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    assert answer.status_code >= 400
    return error["code"]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("patient_id", UNIT),
        ('{"column": "patient_id"}', UNIT),
        ('{"column": "record"}', {"column": "record"}),
        ('{"column": null}', "record"),
        ("record", "record"),
        ("", "record"),
    ],
)
def test_a_unit_is_a_column_in_either_spelling(upload: Upload, said: str, shown: Any) -> None:
    file = upload(DATA, privacy_unit=said)
    assert file["privacy_unit"] == shown
    assert file["num_units"] is None  # not read yet


def test_the_wires_client_spells_it_in_brackets(openai_client: openai.OpenAI) -> None:
    file = openai_client.files.create(
        file=("data.csv", DATA), purpose="fine-tune", extra_body={"privacy_unit": {"column": "patient_id"}}
    )
    assert file.model_extra is not None
    assert file.model_extra["privacy_unit"] == UNIT


def test_the_number_of_units_is_public_and_that_of_their_records_is_not(
    upload: Upload, process: Process, client: TestClient, make_key: Callable[..., str]
) -> None:
    file = process(upload(DATA, privacy_unit="patient_id")["id"])
    assert (file["status"], file["privacy_unit"], file["num_units"], file["num_rows"]) == ("processed", UNIT, 2, None)
    record = process(upload(b"text\na\nb\n")["id"])
    assert (record["privacy_unit"], record["num_units"], record["num_rows"]) == ("record", 2, 2)

    path = f"/v1/files/{file['id']}/units"
    assert client.get(path, params={"max_records_per_unit": 2}).json() == {
        "object": "file.units",
        "privacy_unit": UNIT,
        "num_units": 2,
        "num_rows": 4,
        "max_records_per_unit": 2,
        "units_over_bound": 1,
        "records_over_bound": 1,
    }
    assert client.get(path).json()["records_over_bound"] == 0
    assert client.get(path, params={"max_records_per_unit": 257}).status_code == 400
    for scope in ("read", "submit"):
        headers = {"authorization": f"Bearer {make_key(scope)}"}
        assert code(client.get(path, headers=headers)) == "insufficient_scope"
        assert "4" not in str(client.get(f"/v1/files/{file['id']}", headers=headers).json()["num_rows"])


@pytest.mark.parametrize(
    ("data", "said", "problem", "line"),
    [
        (DATA, "patient", "unit_column_not_found", None),
        (DATA + b"more,pos,\n", "patient_id", "unit_missing", 6),
        (DATA + b"more,pos,ben \n", "patient_id", "unit_padded", 6),
    ],
)
def test_a_file_with_rows_of_nobody_is_refused(
    upload: Upload, process: Process, data: bytes, said: str, problem: str, line: int | None
) -> None:
    file = process(upload(data, privacy_unit=said)["id"])
    assert (file["status"], file["error"]["code"], file["error"]["line"]) == ("error", problem, line)
    assert file["num_units"] is None
    assert "ben" not in str(file["error"])


# --- the same rows again ----------------------------------------------------------------------------------------------


def test_the_same_bytes_keep_their_unit(upload: Upload, try_upload: Callable[..., httpx.Response]) -> None:
    upload(DATA, privacy_unit="patient_id")
    assert upload(DATA)["privacy_unit"] == UNIT
    assert upload(DATA, privacy_unit='{"column": "patient_id"}')["privacy_unit"] == UNIT
    for other in ("record", "label"):
        answer = try_upload(privacy_unit=other)
        assert (answer.status_code, code(answer)) == (409, "privacy_unit_mismatch")


def test_records_that_jobs_have_used_do_not_become_persons(
    upload: Upload, try_upload: Callable[..., httpx.Response], client: TestClient, database: Database
) -> None:
    """What was spent on records says nothing about a person: that ε would be too small."""
    first = upload(DATA)
    assert code(try_upload(privacy_unit="patient_id")) == "privacy_unit_mismatch"
    with database.writing() as session:
        service.hold(session, first["id"], "ftjob-1")
        service.release(session, "ftjob-1")
    assert client.delete(f"/v1/files/{first['id']}").status_code == 200
    assert code(try_upload(privacy_unit="patient_id")) == "privacy_unit_mismatch"
    assert upload(DATA)["privacy_unit"] == "record"


def test_a_unit_that_was_forgotten_can_be_mended_before_any_job(
    upload: Upload, client: TestClient, database: Database
) -> None:
    first = upload(DATA)
    client.delete(f"/v1/files/{first['id']}")
    second = upload(DATA, privacy_unit="patient_id")
    assert second["privacy_unit"] == UNIT
    assert second["privacy_budget"] == first["privacy_budget"]
    with database.reading() as session:
        assert session.get_one(File, second["id"]).used_at is None


def test_the_same_rows_in_another_format_keep_their_unit(upload: Upload, process: Process) -> None:
    assert process(upload(DATA, privacy_unit="patient_id")["id"])["status"] == "processed"
    assert process(upload(LINES, "a.jsonl")["id"])["error"]["code"] == "privacy_unit_mismatch"
    assert process(upload(LINES, "b.jsonl", privacy_unit="record")["id"])["error"]["code"] == "privacy_unit_mismatch"


def test_the_same_rows_under_the_same_unit_are_taken(upload: Upload, process: Process) -> None:
    for data, name in ((DATA, "a.csv"), (LINES, "a.jsonl")):
        assert process(upload(data, name, privacy_unit="patient_id")["id"])["num_units"] == 2


def test_another_projects_rows_bind_nobody(
    upload: Upload, process: Process, client: TestClient, make_key: Callable[..., str]
) -> None:
    process(upload(DATA, privacy_unit="patient_id")["id"])
    headers = {"authorization": f"Bearer {make_key('submit', project='other')}"}
    form = {"purpose": "fine-tune", "privacy_unit": "record"}
    answer = client.post("/v1/files", files={"file": ("data.csv", DATA)}, data=form, headers=headers)
    assert answer.json()["privacy_unit"] == "record"
    file_id = answer.json()["id"]
    process_status = client.get(f"/v1/files/{file_id}", headers=headers).json()["status"]
    assert process_status == "uploaded"


def test_an_upload_sent_twice_with_its_key_names_the_same_unit(client: TestClient) -> None:
    def post(**fields: str) -> httpx.Response:
        form = {"purpose": "fine-tune", **fields}
        return client.post("/v1/files", files={"file": ("a.csv", DATA)}, data=form, headers={"idempotency-key": "one"})

    first = post(privacy_unit="patient_id").json()
    assert post(privacy_unit='{"column": "patient_id"}').json()["id"] == first["id"]
    assert code(post(privacy_unit="record")) == "idempotency_mismatch"


def test_a_budget_that_fixes_a_unit_takes_no_file_of_another(client: TestClient) -> None:
    made = client.post(
        "/v1/privacy_budgets",
        json={"name": "ward", "epsilon_limit": 4.0, "delta": 1e-6, "privacy_unit": {"column": "patient_id"}},
    ).json()

    def post(**fields: str) -> httpx.Response:
        form = {"purpose": "fine-tune", "privacy_budget": made["id"], **fields}
        return client.post("/v1/files", files={"file": ("a.csv", DATA)}, data=form)

    for fields in ({}, {"privacy_unit": "record"}, {"privacy_unit": "doctor"}):
        refused = post(**fields)
        assert (refused.status_code, code(refused)) == (400, "privacy_unit_mismatch")
        assert refused.json()["error"]["param"] == "privacy_unit"
    assert client.get("/v1/files").json()["data"] == []
    entries = client.get(f"/v1/privacy_budgets/{made['id']}/entries").json()["data"]
    assert [entry["kind"] for entry in entries] == ["opened"]
    assert post(privacy_unit="patient_id").status_code == 200
