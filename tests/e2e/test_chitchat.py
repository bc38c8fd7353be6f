"""Real conversations, the sender as privacy unit: skipped where the data, a package of its own, is not installed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from app.privacy.report_check import check_report
from benchmarks import persons
from tests.running import Running

pytestmark = pytest.mark.skipif(
    not persons.installed(), reason="needs the data: pip install --no-deps chitchat-dataset==0.9.0"
)


def test_a_model_is_private_for_each_sender(service: Running, tmp_path: Path) -> None:
    rows = persons.messages()[:3000]
    senders = Counter(row["sender"] for row in rows)
    assert max(senders.values()) > 30
    job, model = persons.train(service, persons.write(tmp_path / "chat.csv", rows), 8.0)
    privacy = job.model_extra["privacy"]
    held_out = model["metrics"]["num_units"]
    assert privacy["privacy_unit"] == {"column": "sender"}
    assert privacy["num_units"] + held_out == len(senders)
    assert model["metrics"]["averaged_over"] == "units"
    report = model["privacy_report"]
    assert report["guarantee"]["privacy_unit"] == {"column": "sender"}
    assert [check.name for check in check_report(report) if not check.holds] == []
    assert not any(sender in str(model) for sender in senders)
