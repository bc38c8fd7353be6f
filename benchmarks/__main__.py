"""`make bench`: the private step beside non-private PyTorch and Opacus, submit to first step, requests per CPU-second.

    python -m benchmarks [--all]

Short by default (the MiniLM workloads, about ten minutes on two cores); --all takes every workload of dp_step.
"""

from __future__ import annotations

import subprocess
import sys

#: Parts of workload names; Opacus beside the first one only, because its steps take longest.
SHORT = ("minilm lora r=8", "minilm last two layers", "minilm head", "real lengths")


def main(arguments: list[str]) -> None:
    """Runs each benchmark in a process of its own, one after another."""
    step = [sys.executable, "-W", "ignore", "-m", "benchmarks.dp_step", "--rounds", "3"]
    run([*step, *(() if "--all" in arguments else ("--workload", "minilm full T=128"))])
    if "--all" not in arguments:
        chosen = [word for name in SHORT for word in ("--workload", name)]
        engines = [word for name in ("non-private", "same products", "ours") for word in ("--engine", name)]
        run([*step, *chosen, *engines, "--no-memory"])
    run([sys.executable, "-m", "benchmarks.first_step"])
    run([sys.executable, "-m", "benchmarks.api_requests"])


def run(command: list[str]) -> None:
    """Prints the command's own table; stops where it fails."""
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
