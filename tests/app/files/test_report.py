"""The owner's report: exact, for admin keys only, audited, erased with its file."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.budgets.tables import LedgerEntry
from app.db.session import Database
from app.files import service
from app.files.reader import read
from app.files.report import QUANTILES, quantiles
from app.files.tables import File
from tests.app.files.conftest import Upload
from tests.app.files.reading import parquet

Process = Callable[[str], dict[str, Any]]

LINES = (
    b'{"patient": "p1", "text": "good", "label": "pos", "tags": ["a", "b"]}\n'
    b'{"patient": "p1", "text": "good", "label": "pos", "tags": ["a", "b"]}\n'
    b'{"patient": "p2", "text": "\xc3\xa4rger", "label": "neg", "tags": ["b", "b"]}\n'
    b'{"patient": "p3", "text": null, "label": "pos", "tags": []}\n'
)


def looks(database: Database, budget_id: str) -> list[tuple[str, dict[str, Any]]]:
    kinds = ("content_read", "report_read")
    with database.reading() as session:
        entries = session.query(LedgerEntry).filter_by(budget_id=budget_id).order_by(LedgerEntry.sequence)
        return [(entry.kind, entry.details) for entry in entries if entry.kind in kinds]


def test_the_owner_sees_exact_figures(upload: Upload, process: Process, client: TestClient) -> None:
    file = process(upload(LINES, "data.jsonl", privacy_unit="patient")["id"])
    assert file["status"] == "processed", file
    report = client.get(f"/v1/files/{file['id']}/report").json()
    assert "not private" in report["notice"]
    assert (report["object"], report["file_id"], report["private"]) == ("file.report", file["id"], False)
    assert (report["num_rows"], report["num_units"], report["duplicate_rows"]) == (4, 3, 1)
    assert report["privacy_unit"] == {"column": "patient"}
    assert report["records_per_unit"] == [[1, 2, 2], [2, 1, 2]]
    assert report["inferred_tasks"][0] == "text_classification"
    assert "chat" not in report["inferred_tasks"]
    text, label, tags = report["columns"][1:]
    assert (text["nulls"], text["lengths"]["0"], text["lengths"]["0.5"], text["lengths"]["1"]) == (1, 4, 4, 5)
    assert list(label["counts"].items()) == [("pos", 3), ("neg", 1)]
    assert (tags["type"], tags["element_counts"]) == ("json", {"b": 4, "a": 2})


def test_the_report_counts_as_python_does(tmp_path: Path) -> None:
    texts = [None if n % 11 == 0 else "ж" * (n * n % 97) for n in range(400)]
    others = [("-", "", None, "x")[n % 17 % 4] for n in range(400)]
    (tmp_path / "source").write_bytes(parquet(tmp_path, text=pa.array(texts), other=pa.array(others)))
    (tmp_path / "rows").mkdir()
    read(tmp_path / "source", "a.parquet", tmp_path / "rows" / "rows.parquet", None, tmp_path / "rows" / "report.json")
    report = service.json.loads((tmp_path / "rows" / "report.json").read_text())
    pairs = list(zip(texts, others, strict=True))
    assert report["duplicate_rows"] == len(pairs) - len(set(pairs))
    text, other = report["columns"]
    sizes = sorted(len(each) for each in texts if each is not None)
    for quantile in QUANTILES:
        within = [size for size in sizes if sum(s <= size for s in sizes) >= quantile * len(sizes)]
        assert text["lengths"][f"{quantile:g}"] == within[0], quantile
    assert abs(text["lengths"]["0.5"] - statistics.median(sizes)) <= 1
    assert other["counts"] == Counter(each for each in others if each is not None)
    assert quantiles([]) is None


def test_images_have_a_report_too(tmp_path: Path, upload: Upload, process: Process, client: TestClient) -> None:
    import io

    from PIL import Image

    drawn = io.BytesIO()
    Image.new("RGB", (4, 4)).save(drawn, "png")
    data = parquet(tmp_path, image=pa.array([drawn.getvalue()] * 3), label=pa.array(["a", "b", "a"]))
    file = process(upload(data, "a.parquet")["id"])
    report = client.get(f"/v1/files/{file['id']}/report").json()
    assert (report["duplicate_rows"], report["inferred_tasks"]) == (1, ["image_classification"])
    assert (report["columns"][0]["type"], report["columns"][0]["lengths"]) == ("image", None)


def test_each_look_at_what_is_not_private_is_audited(
    upload: Upload, process: Process, client: TestClient, database: Database, make_key: Callable[..., str]
) -> None:
    file = process(upload(LINES, "data.jsonl")["id"])
    paths = [f"/v1/files/{file['id']}/{what}" for what in ("report", "content", "units")]
    for scope in ("read", "submit"):
        answers = [client.get(path, headers={"authorization": f"Bearer {make_key(scope)}"}) for path in paths]
        assert [(a.status_code, a.json()["error"]["code"]) for a in answers] == [(403, "insufficient_scope")] * 3
    stranger = {"authorization": f"Bearer {make_key('admin', project='other')}"}
    missing = client.get("/v1/files/file-none/report", headers=stranger)
    foreign = client.get(paths[0], headers=stranger)
    assert (foreign.status_code, foreign.json()["error"]) == (404, missing.json()["error"])
    client.head(paths[1])
    assert looks(database, file["privacy_budget"]) == []
    for path in paths:
        assert client.get(path).status_code == 200
    of = {"file_id": file["id"]}
    looked = [("report_read", of), ("content_read", of), ("report_read", of)]
    assert looks(database, file["privacy_budget"]) == looked
    assert client.get(f"/v1/privacy_budgets/{file['privacy_budget']}/audit").json()["intact"]


def test_a_public_files_report_needs_no_entry(
    upload: Upload, process: Process, client: TestClient, database: Database
) -> None:
    file = process(upload(LINES, "data.jsonl", public="true")["id"])
    assert client.get(f"/v1/files/{file['id']}/report").json()["privacy_unit"] is None
    with database.reading() as session:
        assert session.query(LedgerEntry).filter_by(kind="report_read").count() == 0


@pytest.mark.parametrize("status", ["uploaded", "processed"])
def test_a_file_without_a_report_says_so(
    status: str, upload: Upload, process: Process, client: TestClient, app: FastAPI, database: Database
) -> None:
    file = upload(LINES, "data.jsonl")
    if status == "processed":  # before there were reports
        process(file["id"])
        with database.reading() as session:
            app.state.storage.delete(service.report_key(session.get_one(File, file["id"])))
    answer = client.get(f"/v1/files/{file['id']}/report")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "file_report_not_found")
    assert looks(database, file["privacy_budget"]) == []
