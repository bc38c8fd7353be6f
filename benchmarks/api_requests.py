"""Requests per CPU-second of the API process: submit, retrieve and list, beside the bare framework's `/healthz`.

    python -m benchmarks.api_requests [--requests 300]

The service runs as its users run it (`privtune serve --no-worker`, SQLite, the embedded Valkey) on a loopback port. CPU
seconds are the server process's own, from the operating system; the client's are not counted.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

BASE_MODEL = "all-MiniLM-L6-v2"
ROWS = 400


def main(requests: int) -> None:
    """Prints one table."""
    with tempfile.TemporaryDirectory(prefix="privtune-bench-") as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {**os.environ, "PRIVTUNE_BUDGET_EPSILON": "1000", "PRIVTUNE_LOG_LEVEL": "warning"}
        command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port), "--data-dir", folder]
        server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            measure(server.pid, f"http://127.0.0.1:{port}", Path(folder), requests)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)


def measure(pid: int, url: str, folder: Path, requests: int) -> None:
    """Uploads one small file, then times each kind of request."""
    with httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/readyz").is_success)
        client.headers["Authorization"] = f"Bearer {(folder / 'api_key').read_text().strip()}"
        table = "text,label\n" + "".join(f"sentence number {i},{'ab'[i % 2]}\n" for i in range(ROWS))
        upload = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.csv", table)})
        file = upload.raise_for_status().json()["id"]
        wait_until(lambda: client.get(f"/v1/files/{file}").json()["status"] == "processed")

        # Small ε: every one of these jobs fits into the budget, and none waits for the others.
        body = {"model": BASE_MODEL, "training_file": file, "privacy": {"target_epsilon": 0.5}}
        job = client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
        kinds: dict[str, Callable[[], httpx.Response]] = {
            "healthz (the framework alone)": lambda: client.get("/healthz"),
            "retrieve a job": lambda: client.get(f"/v1/fine_tuning/jobs/{job}"),
            "list 20 jobs": lambda: client.get("/v1/fine_tuning/jobs?limit=20"),
            "estimate, warm": lambda: client.post("/v1/fine_tuning/jobs/estimate", json=body),
            "submit a job, warm": lambda: client.post("/v1/fine_tuning/jobs", json=body),
        }
        reference = None
        print(f"{'request':<32}{'per CPU-second':>16}{'ms CPU each':>14}{'of healthz':>12}")
        for name, send in kinds.items():
            count = requests if "submit" not in name else min(requests, 100)
            for _ in range(5):
                send().raise_for_status()
            before = cpu_seconds(pid)
            for _ in range(count):
                send().raise_for_status()
            each = max(cpu_seconds(pid) - before, 1e-9) / count
            reference = reference or each
            print(f"{name:<32}{1 / each:>16.0f}{each * 1e3:>14.2f}{each / reference:>11.1f}x")


def cpu_seconds(pid: int) -> float:
    """User and system seconds of one process, all its threads, from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Polls; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError("the service did not get ready")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=300)
    main(parser.parse_args().requests)
