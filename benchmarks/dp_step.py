"""One private step beside the non-private one and Opacus, in one table: time and peak memory.

    python -m benchmarks.dp_step [--workload SUBSTRING ...] [--engine NAME ...] [--rounds 3] [--threads 1] [--no-memory]
                                 [--device cuda] [--profile]

On a CPU the engines take turns in one process, and a figure is the median over rounds of the process's CPU time for one
step (forward, backward, clipping, noise on every parameter, optimizer); in brackets the median over rounds of its ratio
to the non-private step of the same round. Peak memory is the resident set's over what the imports took, each engine in
a process of its own. Every process is forked from one that has imported everything and computed nothing. Real lengths:
the non-private step pads the whole batch to its longest row, ours cuts it by length as a job does.

non-private: torch as it comes, AdamW (fused). same products: the same, with the float32 products that our engine takes
on this processor (worker/trainer/dp/products.py): what privacy alone costs. They differ on AMD only.

--profile prints instead where one private step's time goes, by part (a CPU, one thread; `dp_profile`).

On a GPU a figure is wall time between two synchronizations under bf16 autocast, and memory is the allocator's peak.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.privacy.plan import PrivacyPlan, SampledGaussian
from benchmarks.dp_profile import shares
from benchmarks.dp_workloads import CUDA_WORKLOADS, WORKLOADS, Batch, Workload
from worker.trainer.dp import products
from worker.trainer.dp.batching import physical_batches
from worker.trainer.dp.engines import make_engine
from worker.trainer.dp.optimizers import make_optimizer
from worker.trainer.dp.randomness import JobRandomness
from worker.trainer.dp.step import PrivateStep

ENGINES = ("non-private", "same products", "ours", "opacus ghost", "opacus hooks")
MAX_TOKENS = 64 * 128

Step = Callable[[], None]
Figures = dict[str, list[float] | str]


def main() -> None:
    """Prints one table."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    if any(engine.startswith("opacus") for engine in arguments.engine):
        import opacus  # noqa: F401 (imports are not what is measured)
    workloads = WORKLOADS if device.type == "cpu" else CUDA_WORKLOADS
    print(f"{_processor()}, torch {torch.__version__}, threads {arguments.threads}, device {device}, "
          f"load {os.getloadavg()[0]:.1f}, oneDNN products: {products.ONEDNN}")  # fmt: skip
    if not arguments.profile:
        print(f"{'workload':36}" + "".join(f"{engine:>24}" for engine in arguments.engine))
    for name, workload in workloads.items():
        if arguments.workload and not any(part in name for part in arguments.workload):
            continue
        if arguments.profile:
            print(name)
            for part, seconds, share in _in_process(_profile, workload, arguments.rounds):
                print(f"  {part:44}{seconds:8.3f} s{100 * share:7.1f} %", flush=True)
            continue
        # In turns on a CPU, whose load changes; one after another on a GPU, whose memory not all would fit together.
        together = [arguments.engine] if device.type == "cpu" else [[engine] for engine in arguments.engine]
        times: Figures = {}
        for engines in together:
            found = _in_process(_times, workload, engines, arguments.rounds, device)
            times |= dict.fromkeys(engines, found) if isinstance(found, str) else found
        print(f"{name:36}" + "".join(f"{_shown(times, e, 's'):>24}" for e in arguments.engine), flush=True)
        if arguments.memory:
            peaks = {engine: _in_process(_peak, workload, engine, device) for engine in arguments.engine}
            print(f"{'  peak memory':36}" + "".join(f"{_shown(peaks, e, 'MiB'):>24}" for e in arguments.engine))
        for engine, values in times.items():
            if isinstance(values, str):
                print(f"  {engine}, {values}")
    print(f"load {os.getloadavg()[0]:.1f} at the end", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", default=[], help="part of a workload's name; repeatable")
    parser.add_argument("--engine", action="append", choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--profile", action="store_true", help="parts of our step instead of the table")
    arguments = parser.parse_args()
    if arguments.profile and (arguments.device, arguments.threads) != ("cpu", 1):
        parser.error("--profile counts the time of one thread on a CPU")
    # A GPU's products are the same for all.
    arguments.engine = arguments.engine or [e for e in ENGINES if arguments.device == "cpu" or e != "same products"]
    return arguments


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _in_process(measure: Callable[..., Any], *arguments: object) -> Any:
    """What `measure` returns, from a fresh fork of this process, which computes nothing itself."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sending, measure, arguments))
    child.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        return "n/a: killed or out of memory"
    finally:
        child.join()


def _send(connection: Connection, measure: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    connection.send(measure(*arguments))


def _shown(figures: Figures, engine: str, unit: str) -> str:
    if isinstance(figures, str):
        return figures
    values, base = figures[engine], figures.get("non-private")
    if isinstance(values, str):
        return "n/a"
    ratio = ""
    if base and not isinstance(base, str):
        ratio = f" ({statistics.median(v / b for v, b in zip(values, base, strict=True)):.2f})"
    return f"{statistics.median(values):.{3 if unit == 's' else 0}f} {unit}{ratio}"


def _times(workload: Workload, engines: list[str], rounds: int, device: torch.device) -> Figures:
    """Seconds of one step in each round by engine, or why an engine cannot do it."""
    results: Figures = {}
    steps: dict[str, Step] = {}
    for engine in engines:
        try:
            step = make_step(workload, engine, device)
            step()
        except Exception as error:  # Opacus fails on several architectures: that is a finding
            results[engine] = _reason(error)
        else:
            steps[engine] = step
    seconds: dict[str, list[float]] = {engine: [] for engine in steps}
    for _ in range(rounds):
        for engine, step in steps.items():
            start = _clock(device)
            step()
            seconds[engine].append(_clock(device) - start)
    return results | seconds


def _profile(workload: Workload, rounds: int) -> list[tuple[str, float, float]]:
    """(part, seconds, share) of our step, largest first."""
    step = make_step(workload, "ours")
    for _ in range(2):  # the first one chooses the engine
        step()
    seconds = shares(step, torch.optim.AdamW, rounds)
    total = sum(seconds.values())
    return [(part, value, value / total) for part, value in seconds.items()]


def _clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"n/a: {type(error).__name__}: {text[:110]}"


def make_step(workload: Workload, engine: str, device: torch.device | None = None) -> Step:
    """A fresh model and what takes one optimizer step on it."""
    device = device or torch.device("cpu")
    torch.manual_seed(0)
    with device:  # a CPU takes minutes to draw a billion weights
        model = workload.build().train().to(device)
    batch = workload.batch(workload.rows)
    lengths = workload.lengths(workload.rows) if workload.lengths else None
    if lengths is not None:
        batch["attention_mask"] = (torch.arange(128)[None, :] < torch.tensor(lengths)[:, None]).long()
    batch = {name: value.to(device) for name, value in batch.items()}
    half = torch.bfloat16 if device.type == "cuda" else None
    if engine == "ours":
        return _private_step(workload, model, _cut(batch, lengths), half)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer("adamw", trainable, learning_rate=1e-5)
    if engine in ("non-private", "same products"):
        batches = [batch] if lengths is None else _padded(batch, lengths)

        def step() -> None:
            with products.FastLinear() if engine == "same products" else nullcontext():
                for piece in batches:
                    with torch.autocast(device.type, half, enabled=half is not None):
                        losses = workload.loss(model, piece)
                    (losses.sum() / workload.rows).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step
    from tests.trainer.dp.oracles import opacus_step

    if lengths is not None:
        raise NotImplementedError("measured without accumulation")
    wrapped, take = opacus_step(
        model, optimizer, ghost=engine == "opacus ghost", max_grad_norm=1.0, noise_multiplier=1.0
    )

    def opacus() -> None:
        with torch.autocast(device.type, half, enabled=half is not None):
            losses = workload.loss(wrapped, batch)
        take(losses)

    return opacus


def _padded(batch: Batch, lengths: list[int]) -> list[Batch]:
    """The usual way: rows as they come, padded to the longest of the whole batch, in pieces that fit."""
    width = max(lengths)
    cut = {key: value[:, :width] if value.ndim == 2 else value for key, value in batch.items()}
    size = MAX_TOKENS // width
    return [{key: value[i : i + size] for key, value in cut.items()} for i in range(0, len(lengths), size)]


def _cut(batch: Batch, lengths: list[int] | None) -> list[tuple[Batch, Tensor]]:
    device = next(iter(batch.values())).device
    rows = len(next(iter(batch.values())))
    if lengths is None:
        return [(batch, torch.arange(rows, device=device))]
    pieces = []
    for chosen in physical_batches([[row] for row in range(rows)], lengths, max_tokens=MAX_TOKENS):
        index = torch.from_numpy(chosen).to(device)
        width = max(lengths[row] for row in chosen)
        pieces.append(
            ({key: value[index, :width] if value.ndim == 2 else value[index] for key, value in batch.items()}, index)
        )
    return pieces


def _private_step(
    workload: Workload, model: nn.Module, pieces: list[tuple[Batch, Tensor]], half: torch.dtype | None
) -> Step:
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    part = SampledGaussian("main", 0.01, 10**6, noise_multiplier=1.0, max_grad_norm=1.0, clipping="flat")
    plan = PrivacyPlan("dp_sgd", 100 * workload.rows, (part,), target_epsilon=1.0, target_delta=1e-6)
    engine = make_engine(
        model, list(parameters), workload.loss, clipping="flat", max_grad_norm=1.0, autocast_dtype=half
    )
    optimizer = make_optimizer("adamw", parameters.values(), learning_rate=1e-5)
    step = PrivateStep(
        engine,
        optimizer,
        parameters,
        plan=plan,
        part=part,
        randomness=JobRandomness(bytes(range(32))),
        half_precision=half is not None,
    )
    done = iter(range(10**6))

    def run() -> None:
        step.run(next(done), pieces)
        if engine.fallbacks:
            raise NotImplementedError(f"the slow engine, for {engine.fallbacks[:2]}")

    return run


def _peak(workload: Workload, engine: str, device: torch.device) -> list[float] | str:
    """[MiB] at the peak of two steps (the second has the optimizer's state from its start)."""
    imports = _high_water()
    try:
        step = make_step(workload, engine, device)
        for _ in range(2):
            step()
    except Exception as error:
        return _reason(error)
    if device.type == "cuda":
        return [torch.cuda.max_memory_allocated() / 2**20]
    return [(_high_water() - imports) / 1024]


def _high_water() -> int:
    """KiB, of this program alone: getrusage's figure is inherited from whoever started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    main()
