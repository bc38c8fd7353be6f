"""`make bench`: the private step beside non-private PyTorch, submit to first step, requests per CPU-second.

    python -m benchmarks [--all]

By default one table of every workload of dp_step, time alone, medians of three rounds, and Opacus left out (about eight
CPU minutes in all by the sum of its parts); --all adds peak memory and Opacus' two modes, whose steps take longest.
"""

from __future__ import annotations

import subprocess
import sys

PLAIN = ("non-private", "same products", "ours")


def main(arguments: list[str]) -> None:
    """Runs each benchmark in a process of its own, one after another."""
    step = [sys.executable, "-W", "ignore", "-m", "benchmarks.dp_step", "--rounds", "3"]
    if "--all" not in arguments:
        step += ["--no-memory", *(word for name in PLAIN for word in ("--engine", name))]
    run(step)
    run([sys.executable, "-m", "benchmarks.first_step"])
    run([sys.executable, "-m", "benchmarks.api_requests"])


def run(command: list[str]) -> None:
    """Prints the command's own table; stops where it fails."""
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
