"""A trainer that quotes a row, in every way that one can: no response, log line, database row or stored name has it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from app.db.session import Database
from app.jobs.tables import Job
from app.metadata import metadata
from app.settings import Settings
from app.storage import open_storage

Work = Callable[..., Any]
Read = Callable[[], Job]

ROW = "text number 17"  # of the file that `submitted` uploads
QUOTE = (
    "ready(); import os, sys; import pyarrow.parquet as pq;"
    "table = pq.read_table(open(os.path.join(folder, 'data/training.parquet'), 'rb'));"
    "row = table.column('text')[17].as_py();"
)
OUT_OF_MEMORY = "say(type='failed', code='out_of_memory')"


@pytest.mark.parametrize(
    "scripts",
    [
        ("started(); print(row, file=sys.stderr); raise ValueError(row)",),
        ("started(); print(row); sys.stdout.flush(); sys.exit(1)",),
        ("started(); say(type='failed', code=row)",),
        ("started(); say(type='notice', code=row, data={})",),
        ("started(); say(type='notice', code='computing_features', data={'num_units': row, row: 1}); sys.exit(1)",),
        ("started(); say(type='progress', step=1, num_steps=1, phase=row, executed={row: 1})",),
        ("started(); say(type=row)",),
        (OUT_OF_MEMORY, "started(); raise MemoryError(row)", OUT_OF_MEMORY),
    ],
    ids=["traceback", "output", "code", "notice", "fields", "progress", "message", "memory"],
)
def test_no_row_leaves_by_a_trainer_that_quotes_one(
    work: Work,
    job: Read,
    client: TestClient,
    database: Database,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
    scripts: tuple[str, ...],
) -> None:
    caplog.set_level(logging.DEBUG)
    for _ in range(settings.max_attempts + 1):
        work(*(QUOTE + script for script in scripts))
        if job().status in ("failed", "succeeded"):
            break
    assert job().status == "failed"
    shown = [
        client.get(f"/v1/fine_tuning/jobs/{job().id}").text,
        client.get(f"/v1/fine_tuning/jobs/{job().id}/events", params={"limit": 100}).text,
        client.get("/v1/fine_tuning/jobs").text,
        client.get("/v1/models").text,
        client.get("/v1/privacy_budgets").text,
        caplog.text,
    ]
    with database.reading() as session:
        for table in metadata.sorted_tables:
            # What the reader found out about columns stays inside the service, and says so.
            columns = [column for column in table.columns if (table.name, column.name) != ("files", "columns")]
            shown += [json.dumps(list(map(str, row))) for row in session.execute(select(*columns))]
    assert [text for text in shown if ROW in text] == []
    assert ROW not in str(_stored_names(settings))


def _stored_names(settings: Settings) -> list[str]:
    root = open_storage(settings.storage).local_path("x")
    assert root is not None
    return [str(path) for path in Path(root).parent.rglob("*")]
