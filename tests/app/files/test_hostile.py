"""Every hostile file through the reading process itself: a fixed code, bounded memory, nothing outside its folder."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from app.files.limits import limits_for
from app.files.problems import PROBLEMS
from app.files.processing import outcome
from tests.app.files.hostile import CASES, SECRET

#: What the imports take is some 200 MiB of it.
MOST_MEMORY = 2**30


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of each case, what the service makes of its reading."""
    folder = tmp_path_factory.mktemp("hostile")
    jobs = []
    for number, (filename, make, _) in enumerate(CASES.values()):
        own = folder / str(number)
        (own / "output").mkdir(parents=True)
        (own / "source").write_bytes(make())
        jobs.append(
            {
                "source": str(own / "source"),
                "filename": filename,
                "unit_column": None,
                "rows": str(own / "output" / "rows.parquet"),
                "profile": str(own / "output" / "profile.json"),
                "report": str(own / "output" / "report.json"),
                "progress": str(own / "output" / "progress"),
                "limits": asdict(limits_for((own / "source").stat().st_size)),
            }
        )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.app.files.forking", str(folder / "jobs.json")], capture_output=True, check=True
    )
    found = {}
    for name, job, result in zip(CASES, jobs, json.loads(done.stdout), strict=True):
        own = Path(job["source"]).parent
        found[name] = {
            **outcome(Path(job["profile"]), result["code"]),
            "peak": result["peak"],
            "written": {path.name for path in own.iterdir()},
        }
    found["everything"] = {"written": {path.name for path in folder.iterdir()}}
    return found


@pytest.mark.parametrize("name", CASES)
def test_hostile(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    found = outcomes[name]
    assert found["problem"]["code"] == CASES[name][2]
    assert found["problem"]["code"] in PROBLEMS
    assert SECRET.decode() not in json.dumps(found["problem"])
    assert found["peak"] < MOST_MEMORY
    assert found["written"] == {"source", "output"}


def test_nothing_lies_beside_the_folders(outcomes: dict[str, dict[str, Any]]) -> None:
    assert len(CASES) >= 60
    assert outcomes["everything"]["written"] == {*map(str, range(len(CASES))), "jobs.json"}
