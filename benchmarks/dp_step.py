"""One private step beside the non-private one and Opacus, in one table: CPU seconds and peak memory.

    python -m benchmarks.dp_step [--workload SUBSTRING ...] [--engine NAME ...] [--rounds 5] [--threads 1] [--no-memory]

Engines take turns in one process; a figure is the median over rounds of the process's CPU time for one step (forward,
backward, clipping, noise on every parameter, optimizer). Peak memory is measured in a process of its own for each
engine: the resident set's peak over what the imports took. Real lengths: the non-private step pads the whole batch to
its longest row, ours cuts it by length as a job does.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from app.privacy.plan import PrivacyPlan, SampledGaussian
from benchmarks.dp_workloads import WORKLOADS, Batch, Workload
from worker.trainer.dp.batching import physical_batches
from worker.trainer.dp.engines import make_engine
from worker.trainer.dp.optimizers import make_optimizer
from worker.trainer.dp.randomness import JobRandomness
from worker.trainer.dp.step import PrivateStep

ENGINES = ("non-private", "ours", "opacus ghost", "opacus hooks")
MAX_TOKENS = 64 * 128


def main() -> None:
    """Prints one table."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    chosen = {
        name: workload
        for name, workload in WORKLOADS.items()
        if not arguments.workload or any(part in name for part in arguments.workload)
    }
    if arguments.memory_of:
        print(json.dumps(_peak_mebibytes(chosen[arguments.memory_of], arguments.engine[0])))
        return
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, threads {arguments.threads}")
    print(f"{'workload':36}" + "".join(f"{engine:>22}" for engine in arguments.engine))
    for name, workload in chosen.items():
        times = _times(workload, arguments.engine, arguments.rounds)
        print(f"{name:36}" + "".join(f"{_shown(times, engine, 's'):>22}" for engine in arguments.engine), flush=True)
        if arguments.memory:
            peaks = {engine: _peak_in_process(name, engine, arguments.threads) for engine in arguments.engine}
            cells = "".join(f"{_shown(peaks, engine, 'MiB'):>22}" for engine in arguments.engine)
            print(f"{'  peak memory':36}{cells}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", default=[], help="part of a workload's name; repeatable")
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.engine = arguments.engine or list(ENGINES)
    return arguments


def _shown(figures: dict[str, float | str], engine: str, unit: str) -> str:
    value, base = figures[engine], figures.get("non-private")
    if isinstance(value, str):
        return value
    ratio = f" ({value / base:.2f})" if isinstance(base, float) else ""
    return f"{value:.3f} {unit}{ratio}" if unit == "s" else f"{value:.0f} {unit}{ratio}"


def _times(workload: Workload, engines: list[str], rounds: int) -> dict[str, float | str]:
    """Median CPU seconds of one step by engine, or the name of the error that it ended with."""
    results: dict[str, float | str] = {}
    steps: dict[str, Callable[[], None]] = {}
    for engine in engines:
        try:
            steps[engine] = make_step(workload, engine)
            steps[engine]()
        except Exception as error:  # Opacus fails on several architectures: that is a finding
            steps.pop(engine, None)
            results[engine] = type(error).__name__
    seconds: dict[str, list[float]] = {engine: [] for engine in steps}
    for _ in range(rounds):
        for engine, step in steps.items():
            start = time.process_time()
            step()
            seconds[engine].append(time.process_time() - start)
    return results | {engine: statistics.median(values) for engine, values in seconds.items()}


def make_step(workload: Workload, engine: str) -> Callable[[], None]:
    """A fresh model and what takes one optimizer step on it."""
    torch.manual_seed(0)
    model = workload.build().train()
    batch = workload.batch(workload.rows)
    lengths = workload.lengths(workload.rows) if workload.lengths else None
    if lengths is not None:
        batch["attention_mask"] = (torch.arange(128)[None, :] < torch.tensor(lengths)[:, None]).long()
    if engine == "ours":
        return _private_step(workload, model, _cut(batch, lengths))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer("adamw", trainable, learning_rate=1e-5)
    batches = [batch] if lengths is None else _padded(batch, lengths)
    if engine == "non-private":

        def step() -> None:
            for piece in batches:
                (workload.loss(model, piece).sum() / workload.rows).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step
    from tests.trainer.dp.oracles import opacus_step

    if lengths is not None:
        raise NotImplementedError("measured without accumulation")
    wrapped, take = opacus_step(
        model, optimizer, ghost=engine == "opacus ghost", max_grad_norm=1.0, noise_multiplier=1.0
    )
    return lambda: take(workload.loss(wrapped, batch))


def _padded(batch: Batch, lengths: list[int]) -> list[Batch]:
    """The usual way: rows as they come, padded to the longest of the whole batch, in pieces that fit."""
    width = max(lengths)
    cut = {key: value[:, :width] if value.ndim == 2 else value for key, value in batch.items()}
    size = MAX_TOKENS // width
    return [{key: value[i : i + size] for key, value in cut.items()} for i in range(0, len(lengths), size)]


def _cut(batch: Batch, lengths: list[int] | None) -> list[tuple[Batch, Tensor]]:
    rows = len(next(iter(batch.values())))
    if lengths is None:
        return [(batch, torch.arange(rows))]
    pieces = []
    for chosen in physical_batches([[row] for row in range(rows)], lengths, max_tokens=MAX_TOKENS):
        index = torch.from_numpy(chosen)
        width = max(lengths[row] for row in chosen)
        pieces.append(
            ({key: value[index, :width] if value.ndim == 2 else value[index] for key, value in batch.items()}, index)
        )
    return pieces


def _private_step(workload: Workload, model: nn.Module, pieces: list[tuple[Batch, Tensor]]) -> Callable[[], None]:
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    part = SampledGaussian("main", 0.01, 10**6, noise_multiplier=1.0, max_grad_norm=1.0, clipping="flat")
    plan = PrivacyPlan("dp_sgd", 100 * workload.rows, (part,), target_epsilon=1.0, target_delta=1e-6)
    engine = make_engine(model, list(parameters), workload.loss, clipping="flat", max_grad_norm=1.0)
    optimizer = make_optimizer("adamw", parameters.values(), learning_rate=1e-5)
    step = PrivateStep(engine, optimizer, parameters, plan=plan, part=part, randomness=JobRandomness(bytes(range(32))))
    done = iter(range(10**6))
    return lambda: step.run(next(done), pieces)


def _peak_mebibytes(workload: Workload, engine: str) -> float | str:
    if engine.startswith("opacus"):
        import tests.trainer.dp.oracles  # noqa: F401 (imports are not what is measured)
    imports = _high_water()
    try:
        step = make_step(workload, engine)
        for _ in range(2):
            step()
    except Exception as error:
        return type(error).__name__
    return (_high_water() - imports) / 1024


def _high_water() -> int:
    """KiB, of this program alone: getrusage's figure is inherited from whoever started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def _peak_in_process(workload: str, engine: str, threads: int) -> float | str:
    command = [sys.executable, "-m", "benchmarks.dp_step", "--memory-of", workload, "--workload", workload]
    command += ["--engine", engine, "--threads", str(threads)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
