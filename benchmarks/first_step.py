"""From the HTTP submit to the first optimizer step, on a running service with a warm spare; where the time goes.

    python -m benchmarks.first_step [--rounds 3]

`privtune serve` as its users run it (SQLite, the embedded Valkey, one worker) on a loopback port, a file of 200 short
rows that was uploaded and processed before. A job's time runs from sending the POST to the first progress event of at
least one step of a phase. Every part is read from the job's own events as they are stored: queued → claimed and loaded
(the trainer's `The model is loaded and checked`) → features over all rows (work over the data, which grows with the
file) → first step. The first job after the start, which plans cold, is printed apart.

Two lines for each job: wall seconds, and CPU seconds of the processes that the part waits for (the API for the request,
behind it the worker and its trainer), which a machine that others use does not stretch so
much (PRIVTUNE_THREADS=1 keeps torch's threads from waiting for each other there).
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
from collections.abc import Sequence
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
#: A job is submitted once worker and spare have used no CPU time for so many seconds: the spare is warm then.
QUIET_SECONDS = 4.0

#: (wall seconds, CPU seconds) of each part.
Parts = tuple[list[float], list[float]]


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
            measure(f"http://127.0.0.1:{port}", Path(folder), rounds, server.pid)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=120)


def measure(url: str, folder: Path, rounds: int, server: int) -> None:
    """Uploads one small file, then submits jobs one after another."""
    with httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/readyz").is_success, 120)
        client.headers["Authorization"] = f"Bearer {(folder / 'api_key').read_text().strip()}"
        table = "text,label\n" + "".join(f"sentence number {i},{'ab'[i % 2]}\n" for i in range(ROWS))
        upload = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.csv", table)})
        file = upload.raise_for_status().json()["id"]
        wait_until(lambda: client.get(f"/v1/files/{file}").json()["status"] == "processed", 120)
        wait_for_spare(server)
        print(f"{'seconds':<24}{'submit':>9}{'loaded':>9}{'features':>10}{'step':>8}{'sum':>8}")
        for name, job in JOBS.items():
            found: list[Parts] = []
            for index in range(rounds + 1):
                body = {"model": BASE_MODEL, "training_file": file, "privacy": {"target_epsilon": 0.5}, **job}
                parts = first_step(client, body, server)
                if index == 0:
                    show(f"{name}, cold plan", parts)
                else:
                    found.append(parts)
                wait_for_spare(server)
            show(name, list(map(_medians, zip(*found, strict=True))))


def first_step(client: httpx.Client, body: dict[str, Any], server: int) -> Parts:
    """Of the request, until the model is loaded and checked, until features are there, until the first step."""
    moments = {"start": (time.monotonic(), *cpu_seconds(server))}
    job = client.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    moments["submitted"] = (time.monotonic(), *cpu_seconds(server))
    while "step" not in moments:
        time.sleep(0.05)
        events = client.get(f"/v1/fine_tuning/jobs/{job}/events?limit=50").raise_for_status().json()["data"]
        now = (time.monotonic(), *cpu_seconds(server))
        for event in events:
            data = event.get("data") or {}
            executed = {name: steps for name, steps in (data.get("executed") or {}).items() if name != "centring"}
            if "loaded and checked" in event["message"]:
                moments.setdefault("loaded", now)
            if data.get("executed"):  # the centring is the first thing done with the features
                moments.setdefault("features", now)
            if any(steps >= 1 for steps in executed.values()):
                moments.setdefault("step", now)
        if now[0] - moments["start"][0] > 300:
            raise TimeoutError("no step in five minutes")
    wait_until(lambda: client.get(f"/v1/fine_tuning/jobs/{job}").json()["status"] in ("succeeded", "failed"), 600)
    walls, apis, workers = zip(
        *(moments[name] for name in ("start", "submitted", "loaded", "features", "step")), strict=True
    )
    # The worker may have begun before the answer was read: what it used since the start counts as loading.
    return _parts(walls), [apis[1] - apis[0], *_parts([workers[0], *workers[2:]])]


def wait_for_spare(server: int) -> None:
    """Until the worker has one that has imported all it needs, and is idle."""
    before, used = -1.0, cpu_seconds(server)[1]
    while abs(used - before) > 0.05 or used < 1.0:  # less, and there is none yet
        time.sleep(QUIET_SECONDS)
        before, used = used, cpu_seconds(server)[1]


def cpu_seconds(server: int) -> tuple[float, float]:
    """(of the API, of the training worker and its trainer), by the kernel's count in ticks of 10 ms."""
    api = worker = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            fields = (folder / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        if int(folder.name) == server:
            api += used
        elif ("worker.trainer" in command or "worker.main training" in command) and _below(folder, server):
            worker += used
    return api, worker


def _below(folder: Path, server: int) -> bool:
    """Whether that process descends from the server."""
    try:
        while folder.name not in ("0", "1", str(server)):
            folder = Path("/proc") / (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
    except OSError:
        return False
    return folder.name == str(server)


def _parts(moments: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(moments)]


def _medians(rounds: Sequence[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def show(name: str, parts: Sequence[list[float]]) -> None:
    """Two lines."""
    for label, row in zip((f"{name}, wall", f"{name}, CPU"), parts, strict=True):
        cells = "".join(f"{value:>{width}.2f}" for value, width in zip((*row, sum(row)), (9, 9, 10, 8, 8), strict=True))
        print(f"{label:<24}{cells}   load {os.getloadavg()[0]:.0f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    main(parser.parse_args().rounds)
