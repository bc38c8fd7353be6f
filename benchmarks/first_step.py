"""From the HTTP submit to the first optimizer step, on a running service with a warm spare; where the time goes.

    python -m benchmarks.first_step [--rounds 3]

`privtune serve` as its users run it (SQLite, the embedded Valkey, one worker) on a loopback port, a file of 200 short
rows that was uploaded and processed before. A job's time runs from sending the POST to the first progress event of at
least one step of a phase; all of it is wall time. Every part is read from the job's own events and the trainer's
messages as they are stored: queued → claimed and loaded (the trainer's `The model is loaded and checked`) → features
over all rows (work over the data, which grows with the file) → first step. The first job after the start, which plans
cold, is printed apart.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks.api_requests import BASE_MODEL, wait_until

ROWS = 200
JOBS: dict[str, dict[str, Any]] = {
    "head": {"adaptation": {"type": "head"}},
    "lora": {"adaptation": {"type": "lora"}},
}
#: Seconds that a finished job's successor waits, so that the next spare has imported what it needs.
SPARE_SECONDS = 30.0


def main(rounds: int) -> None:
    """Prints one table."""
    with tempfile.TemporaryDirectory(prefix="privtune-bench-") as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {**os.environ, "PRIVTUNE_BUDGET_EPSILON": "1000", "PRIVTUNE_LOG_LEVEL": "warning"}
        command = [sys.executable, "-m", "app.cli", "serve", "--port", str(port), "--data-dir", folder]
        server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            measure(f"http://127.0.0.1:{port}", Path(folder), rounds)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=120)


def measure(url: str, folder: Path, rounds: int) -> None:
    """Uploads one small file, then submits jobs one after another."""
    with httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/readyz").is_success, 120)
        client.headers["Authorization"] = f"Bearer {(folder / 'api_key').read_text().strip()}"
        table = "text,label\n" + "".join(f"sentence number {i},{'ab'[i % 2]}\n" for i in range(ROWS))
        upload = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.csv", table)})
        file = upload.raise_for_status().json()["id"]
        wait_until(lambda: client.get(f"/v1/files/{file}").json()["status"] == "processed", 120)
        time.sleep(SPARE_SECONDS)
        print(f"seconds of wall time, load {os.getloadavg()[0]:.1f}")
        print(f"{'job':<16}{'submit':>9}{'loaded':>9}{'features':>10}{'step':>8}{'sum':>8}")
        for name, job in JOBS.items():
            found = []
            for index in range(rounds + 1):
                body = {"model": BASE_MODEL, "training_file": file, "privacy": {"target_epsilon": 0.5}, **job}
                parts = first_step(client, body)
                if index == 0:
                    show(f"{name}, cold plan", parts)
                else:
                    found.append(parts)
                time.sleep(SPARE_SECONDS)
            show(name, [statistics.median(column) for column in zip(*found, strict=True)])


def first_step(client: httpx.Client, body: dict[str, Any]) -> list[float]:
    """[the request, until the model is loaded and checked, until features are there, until the first step]."""
    start = time.monotonic()
    job = client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    moments = {"submitted": time.monotonic()}
    while "step" not in moments:
        time.sleep(0.02)
        events = client.get(f"/v1/fine_tuning/jobs/{job}/events?limit=50").raise_for_status().json()["data"]
        now = time.monotonic()
        for event in events:
            data = event.get("data") or {}
            executed = {name: steps for name, steps in (data.get("executed") or {}).items() if name != "centring"}
            if "loaded and checked" in event["message"]:
                moments.setdefault("loaded", now)
            if data.get("executed"):  # the centring is the first thing done with the features
                moments.setdefault("features", now)
            if any(steps >= 1 for steps in executed.values()):
                moments.setdefault("step", now)
        if now - start > 300:
            raise TimeoutError("no step in five minutes")
    wait_until(lambda: client.get(f"/v1/fine_tuning/jobs/{job}").json()["status"] in ("succeeded", "failed"), 600)
    times = [start, *(moments[name] for name in ("submitted", "loaded", "features", "step"))]
    return [after - before for before, after in pairwise(times)]


def show(name: str, parts: list[float]) -> None:
    """One line."""
    cells = "".join(f"{value:>{width}.2f}" for value, width in zip((*parts, sum(parts)), (9, 9, 10, 8, 8), strict=True))
    print(f"{name:<16}{cells}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    main(parser.parse_args().rounds)
