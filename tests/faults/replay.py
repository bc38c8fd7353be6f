"""The undisturbed run of a job: its own spec, rows and key, given to a trainer that nobody interrupts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from app import tether
from app.db.session import Database
from app.jobs import lifecycle
from tests.running import Running, until


def rows_given(service: Running) -> Path:
    """The folder of the running trainer, once it has the rows."""
    return until(lambda: next((path.parent for path in (service.data_dir / "jobs").glob("job-*/data")), None))


def record(service: Running, job_id: str, target: Path) -> bytes:
    """Copies the job's spec and rows out of its running trainer's folder; its secret key, before it is erased."""
    folder = rows_given(service)
    shutil.copytree(folder / "data", target / "data")
    shutil.copy(folder / "spec.json", target / "spec.json")
    secret = bytes.fromhex((service.data_dir / "secret_key").read_text())
    database = Database(f"sqlite:///{service.data_dir / 'privtune.db'}")
    try:
        with database.reading() as session:
            return lifecycle.job_key(session, job_id, secret)
    finally:
        database.dispose()


def run(folder: Path, key: bytes) -> bytes:
    """The weights that come out."""
    done = subprocess.run(
        [sys.executable, "-m", "worker.trainer", str(folder)],
        input=key.hex().encode() + b"\n",
        env=tether.importable(os.environ),
        cwd=folder,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return (folder / "results" / "model" / "model.safetensors").read_bytes()
