"""The service as a user runs it: `privtune serve` in a process of its own, and what tests ask about it."""

from __future__ import annotations

import csv
import json
import os
import queue
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import openai
import redis

from app.processes import socket_folder

REPOSITORY = Path(__file__).resolve().parent.parent
SNIPPETS = REPOSITORY / "demo" / "movie_snippets.csv"
BASE_MODEL = "all-MiniLM-L6-v2"
TERMINAL = ("succeeded", "failed", "cancelled")

Value = TypeVar("Value")


def until(ask: Callable[[], Value], seconds: float = 60.0, every: float = 0.05) -> Value:
    """The first true answer; AssertionError where none came in time."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(every)
    return answer


def write_snippets(path: Path, rows: int, start: int = 0) -> Path:
    """A small dataset from the demo's, both classes in it."""
    with SNIPPETS.open(newline="", encoding="utf-8") as file:
        everything = list(csv.DictReader(file))
    stride = len(everything) // rows
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(everything[start::stride][:rows])
    return path


class Running:
    """A running service on a free port. `env` adds settings."""

    def __init__(self, data_dir: Path, *arguments: str, **env: str) -> None:
        self.data_dir = data_dir
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("PRIVTUNE_") and name not in ("DATABASE_URL", "REDIS_URL", "STORAGE_URL")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve", "--port", "0", "--data-dir", str(data_dir), *arguments],
            cwd=REPOSITORY,
            env={**environment, "HF_HUB_OFFLINE": "1", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.output: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._collect, daemon=True).start()
        self.url = self._wait_for_url()

    def client(self, **options: Any) -> openai.OpenAI:
        """The unmodified client with the admin key."""
        key = (self.data_dir / "api_key").read_text().strip()
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **options)

    def broker(self) -> redis.Redis:
        """The embedded Valkey."""
        return redis.Redis(unix_socket_path=str(socket_folder(self.data_dir, "valkey") / "valkey.sock"))

    def database(self) -> sqlite3.Connection:
        """The embedded database, to read."""
        return sqlite3.connect(f"file:{self.data_dir / 'privtune.db'}?mode=ro", uri=True)

    def tree(self) -> dict[int, str]:
        """Every process that descends from the service, by its id, and the service itself."""
        parents, commands = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stat = (entry / "stat").read_text().rpartition(")")[2].split()
                    if stat[0] != "Z":
                        parents[int(entry.name)] = int(stat[1])
                        commands[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except (FileNotFoundError, ProcessLookupError):
                    continue
        family = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= more
        return {pid: commands[pid] for pid in family if pid in commands}

    def find(self, words: str) -> int:
        """The process of the service whose command holds these words, once there is one."""
        return until(lambda: next((pid for pid, command in self.tree().items() if words in command), 0))

    def trainers(self) -> list[int]:
        """Trainer processes, spares included."""
        return [pid for pid, command in self.tree().items() if "-m worker.trainer" in command]

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Log entries of this name, so far."""
        entries = (json.loads(line) for line in self.output if line.startswith("{"))
        return [entry for entry in entries if entry.get("event") == event]

    def training(self, attempt: int = 1) -> int:
        """The process of a job's trainer, once its attempt of that number has begun."""

        def begun() -> int:
            return next((entry["pid"] for entry in self.logged("trainer_begins") if entry["attempt"] == attempt), 0)

        return until(begun)

    def kill(self) -> None:
        """kill -9 of the service's own process, and of nothing else."""
        self.process.kill()
        self.process.wait()

    def stop(self, number: int = signal.SIGINT, seconds: float = 40.0) -> int:
        """Ctrl-C, or another signal; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()

    def _collect(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                self.output.append(line.decode())
                self._lines.put(line.decode())
        except ValueError:
            pass  # closed under us, at the end
        self._lines.put(None)

    def _wait_for_url(self) -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            line = self._lines.get(timeout=60)
            if line is None:
                self.process.wait()
                raise AssertionError("the service ended:\n" + "".join(self.output))
            if found := re.search(r"listens on (http://\S+)", line):
                return found[1]
        raise AssertionError("the service did not say where it listens")


def gone(pids: Iterator[int] | set[int]) -> bool:
    """Whether none of these processes runs; zombies do not."""
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return False
        except (FileNotFoundError, ProcessLookupError):
            continue
    return True


def wait_for_job(client: openai.OpenAI, job_id: str, seconds: float = 120.0) -> Any:
    """The job, once it has ended."""

    def ended() -> Any:
        job = client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in TERMINAL else None

    return until(ended, seconds, every=0.2)
