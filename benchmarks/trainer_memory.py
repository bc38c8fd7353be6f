"""A trainer's memory on texts of many lengths, with other limits of what is kept of compiled products, side by side.

    python -m benchmarks.trainer_memory [--adaptation NAME ...] [--kept N ...] [--rows 1200] [--steps 12]
                                        [--env NAME=VALUE ...]

Each line is a job on the demo's film snippets and MiniLM (a warm head for two steps, then the adaptation, half of the
rows in a step), in a trainer process of its own, one thread. MiB: the resident set at its highest; of the C library's
heap at the end what is in use and what is free within it. Seconds: CPU time of the adaptation's steps, the median.
kept: of how many shapes (`worker/trainer/sandbox.py`); 1024 is what the libraries do by themselves. --env: further
variables of every trainer, for the C library's own settings.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from app.catalog.adaptations import Adaptation, AttentiveHead, AttentiveLora, BitFit, Full, Head, LastLayers, Lora
from app.catalog.bases import BASES
from app.catalog.recipes import HEAD_PHASE, MAIN_PHASE, Phase
from tests.running import BASE_MODEL
from tests.trainer.jobs import KEY, make_job
from worker.trainer.spec import TaskSpec

SNIPPETS = Path(__file__).parents[1] / "demo/movie_snippets.csv"
ADAPTATIONS: dict[str, Adaptation] = {
    "attentive_lora": AttentiveLora(4),
    "lora": Lora(),
    "last_layers": LastLayers(),
    "bitfit": BitFit(),
    "full": Full(),
}


class _Heap(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "keepcost")
    )


def main(arguments: argparse.Namespace) -> None:
    """Prints one table."""
    print(
        f"{'adaptation':<16}{'kept':>6}{'peak':>8}{'in use':>8}{'free':>8}{'step':>9}   (load {os.getloadavg()[0]:.1f})"
    )
    for name in arguments.adaptation or ["attentive_lora"]:
        for kept in arguments.kept or [1024, 64]:
            with tempfile.TemporaryDirectory(prefix="privtune-bench-") as folder:
                lay_out(Path(folder) / "job", ADAPTATIONS[name], arguments.rows, arguments.steps)
                found = in_trainer(Path(folder) / "job", kept, arguments.env)
            print(
                f"{name:<16}{kept:>6}{found['peak']:>8}{found['used']:>8}{found['free']:>8}{found['step']:>7.2f} s",
                flush=True,
            )


def lay_out(folder: Path, adaptation: Adaptation, rows: int, steps: int) -> None:
    """A job folder with evenly spread rows."""
    with SNIPPETS.open(encoding="utf-8", newline="") as file:
        table = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    package = importlib.util.find_spec(BASES[BASE_MODEL].package)
    assert package is not None
    assert package.origin is not None
    head = Phase(HEAD_PHASE, Head(), 0.5, 2, 0.2, 0.2, averaging=0.9, noise_ratio=3.0)
    if isinstance(adaptation, AttentiveLora):
        head = dataclasses.replace(head, adaptation=AttentiveHead(adaptation.num_layers))
    make_job(
        folder,
        Path(package.origin).parent / BASES[BASE_MODEL].path,
        phases=(head, Phase(MAIN_PHASE, adaptation, 0.5, steps, 1e-3, 1e-3, averaging=0.9)),
        data=[table[index * len(table) // rows] for index in range(rows)],
        evaluation="none",
        tokens=0,
        task=TaskSpec("text_classification", {"text": "review", "label": "mood"}, ("negative", "positive"), 256),
        loss_bound=None,
    )


def in_trainer(folder: Path, kept: int, env: list[str]) -> dict[str, Any]:
    """Figures of that job."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    limits = dict.fromkeys(("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"), str(kept))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.trainer_memory", "--child", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **quiet, **limits, **dict(pair.split("=", 1) for pair in env)},
        input=KEY.hex() + "\n",
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def as_trainer(folder: str) -> None:
    """Runs the job in this process, and prints its figures."""
    from worker.trainer.__main__ import main as trainer
    from worker.trainer.dp.step import PrivateStep

    seconds: list[float] = []
    run = PrivateStep.run

    def timed(self: PrivateStep, *arguments: Any, **named: Any) -> Any:
        began = time.process_time()
        released = run(self, *arguments, **named)
        seconds.append(time.process_time() - began)
        return released

    PrivateStep.run = timed  # type: ignore[method-assign]
    assert trainer([folder]) == 0
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Heap
    heap = mallinfo2()
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) >> 10 for line in status if line.startswith("VmHWM"))
    figures = {"peak": peak, "used": heap.used >> 20, "free": heap.free >> 20, "step": statistics.median(seconds[2:])}
    print(json.dumps(figures))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adaptation", action="append", choices=ADAPTATIONS)
    parser.add_argument("--kept", action="append", type=int)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.child:
        as_trainer(parsed.child)
    else:
        main(parsed)
