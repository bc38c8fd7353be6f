"""The reader's limits on a large machine, where libraries that start a thread for every core would fill them alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from app.files.limits import limits_for
from app.files.processing import outcome, reader_environment

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, to make up a machine with many cores")


@pytest.mark.parametrize("cores", [64, 512])
def test_a_file_is_read_on_many_cores(tmp_path: Path, cores: int) -> None:
    library = tmp_path / "many_cores.so"
    source = Path(__file__).with_name("many_cores.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    environment = {**reader_environment(tmp_path), "LD_PRELOAD": str(library), "FAKE_CORES": str(cores)}
    count = [sys.executable, "-c", "import os; print(os.cpu_count())"]
    assert subprocess.run(count, env=environment, check=True, capture_output=True).stdout == b"%d\n" % cores
    (tmp_path / "source").write_text("text,label\n" + "a film,good\n" * 300)
    paths = {name: str(tmp_path / name) for name in ("source", "rows", "profile", "report", "progress")}
    limits = asdict(limits_for(10_000))
    job = {**paths, "filename": "a.csv", "unit_column": None, "limits": limits, "parent": os.getpid()}
    child = subprocess.run([sys.executable, "-m", "app.files.reader", json.dumps(job)], env=environment)
    assert outcome(tmp_path / "profile", child.returncode)["num_rows"] == 300
