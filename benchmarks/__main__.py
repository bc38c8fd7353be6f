"""`make bench`: the private step beside non-private PyTorch and Opacus, submit to first step, requests per CPU-second.

    python -m benchmarks [--short]

By default the whole table of dp_step, time and peak memory, medians of three interleaved rounds. --short leaves out
memory and Opacus, whose steps take longest.
"""

from __future__ import annotations

import subprocess
import sys

PLAIN = ("non-private", "same products", "ours")


def main(arguments: list[str]) -> None:
    """Runs each benchmark in a process of its own, one after another."""
    step = [sys.executable, "-W", "ignore", "-m", "benchmarks.dp_step", "--rounds", "3"]
    if "--short" in arguments:
        step += ["--no-memory", *(word for name in PLAIN for word in ("--engine", name))]
    run(step)
    run([sys.executable, "-m", "benchmarks.first_step"])
    run([sys.executable, "-m", "benchmarks.api_requests"])


def run(command: list[str]) -> None:
    """Prints the command's own table; stops where it fails."""
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
