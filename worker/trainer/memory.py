"""The physical batch in tokens, measured: a dry run on synthetic rows at two sizes, against the memory that is free.

Speed and memory only, never privacy: the update is the same whatever the cut. What is measured is public (no private
row is read before), and frozen on the job at its first attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from app.catalog.memory import MOST_BATCH_TOKENS, MOST_FEATURE_BYTES
from worker.trainer.dp.engine import Batch, GradientEngine
from worker.trainer.dp.products import FastLinear
from worker.trainer.dp.reduce import least_of_ranks, rank_and_world_size
from worker.trainer.families.interface import PooledFamily, TokenFamily
from worker.trainer.job import Job, PreparedPhase, reads_tokens
from worker.trainer.loop import require_gradients

LEAST_TOKENS = 64

#: What may be planned with: a CPU's memory is shared with everything else, and its allocator leaves holes.
_SHARE = {"cpu": 0.5, "cuda": 0.9}
_SHORT = 128  # tokens of a dry run's row, at first
_ROWS = (1, 3)  # a line needs no more, and a job waits for them


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one physical batch: `fixed` and `per_token`, a line through two measurements. state: what the optimizer
    keeps."""

    fixed: float
    per_token: float
    state: int

    @classmethod
    def through(cls, small: tuple[int, int], large: tuple[int, int], state: int) -> Need:
        """small, large: (tokens, bytes at the peak)."""
        per_token = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
        return cls(max(0.0, small[1] - per_token * small[0]), per_token, state)

    def tokens_within(self, free: float, most: int) -> int:
        """The largest multiple of LEAST_TOKENS that fits `free` bytes, at most `most`, at least LEAST_TOKENS."""
        left = free - self.fixed - self.state
        fit = most if self.per_token == 0.0 else min(most, int(max(0.0, left) / self.per_token))
        return max(LEAST_TOKENS, fit // LEAST_TOKENS * LEAST_TOKENS)


def feature_bytes(job: Job, phases: Sequence[PreparedPhase]) -> int:
    """What `features` keeps of all rows while steps are made: of tokens at most half of what may be planned with, and
    no more than MOST_FEATURE_BYTES; the same on every rank.

    Reckoned from public sizes: where a unit has several rows, their number is not among them.
    """
    if not any(prepared.on_features for prepared in phases):
        return 0
    family, plan = job.family, job.spec.plan
    assert isinstance(family, PooledFamily | TokenFamily)
    bytes_of_vector = 4 * family.head_module(job.model).in_features
    rows = plan.num_units if plan.privacy_unit.column is None else None
    if isinstance(family, PooledFamily) and not any(map(reads_tokens, phases)):
        return 2 * (rows or 0) * bytes_of_vector  # before centring and after
    most = MOST_FEATURE_BYTES if rows is None else min(MOST_FEATURE_BYTES, rows * _longest(job) * bytes_of_vector)
    return least_of_ranks(int(min(most, _plannable(job) / 2)))


def physical_batch_tokens(
    job: Job, phases: Sequence[PreparedPhase], engines: Sequence[GradientEngine], features: int = 0
) -> int:
    """Tokens, padding included, that one forward pass takes: as the operator said, else what fits, the same on every
    rank. A row longer than that still goes through, alone. features: bytes that are kept beside it, while phases are
    trained on them.

    A collective in either case: while a rank may still fail for what has nothing to do with rows, no other, whose
    memory it shares, has read one.
    """
    return least_of_ranks(job.spec.runtime.max_physical_batch_tokens or _fitting(job, phases, engines, features))


def _fitting(job: Job, phases: Sequence[PreparedPhase], engines: Sequence[GradientEngine], features: int) -> int:
    """What fits this rank."""
    free, fits = _plannable(job), MOST_BATCH_TOKENS[job.device.torch_device.type]
    pairs = list(zip(phases, engines, strict=True))
    beside = []  # what fits beside the features, by the need of phases that do not hold them
    for prepared, engine in pairs:
        if not prepared.on_features:
            need = _need_at_longest(job, prepared, engine, free, fits)
            fits = need.tokens_within(free, fits)
            beside.append(need.tokens_within(free - features, fits))
    # A body that only computes features keeps nothing of what the same body keeps in training: where even that fits
    # beside them, it needs no run.
    if min(beside, default=0) < fits:
        for prepared, engine in [pair for pair in pairs if pair[0].on_features][:1]:
            need = _need_at_longest(job, prepared, engine, free - features, fits)
            fits = need.tokens_within(free - features, fits)
    return fits


def _need_at_longest(job: Job, prepared: PreparedPhase, engine: GradientEngine, free: float, most: int) -> Need:
    """A phase's need with rows as long as there may be, or more where `most` tokens fit `free` all the same."""
    longest = _longest(job)
    need = measured(job, prepared, engine, rows=_ROWS, length=min(longest, _SHORT))
    # Nothing grows faster than with the square of a row's length: where even that fits, longer rows need no run.
    worst = Need(need.fixed, need.per_token * max(1.0, longest / _SHORT), need.state)
    if longest > _SHORT and worst.tokens_within(free, most) < most:
        return measured(job, prepared, engine, rows=(1, 2), length=longest)
    return worst


def _plannable(job: Job) -> float:
    """Bytes of the free ones that this rank may plan with."""
    device = job.device.torch_device
    free = _SHARE[device.type] * free_bytes(device)
    return free / rank_and_world_size()[1] if device.type == "cpu" else free


def _longest(job: Job) -> int:
    """Tokens of the longest row that there may be."""
    return min(job.spec.task.max_length, job.family.max_length(job.model))


def measured(job: Job, prepared: PreparedPhase, engine: GradientEngine, *, rows: tuple[int, int], length: int) -> Need:
    """A phase's need, from dry runs on two numbers of synthetic rows of that length."""
    device = job.device.torch_device
    examples = job.task.synthetic(job.model, rows=4)
    example = job.task.batch(examples, range(len(examples)), device)
    require_gradients(job, prepared)
    peaks = []
    for count in rows:
        batch = stretched(example, count, length)

        def run(batch: Batch = batch, count: int = count) -> None:
            if prepared.on_features:  # the body runs once over all rows, and keeps nothing
                with torch.no_grad(), FastLinear():
                    job.task.outputs(job.model, batch)
            else:
                engine.accumulate(batch, torch.arange(count, device=device))
                engine.reset()

        peaks.append((count * length, peak_bytes(run, device)))
    # Two moments, the noised sums, and the average of the weights where there is one.
    copies = 3 + (prepared.phase.averaging is not None)
    state = copies * 4 * sum(parameter.numel() for parameter in prepared.parameters.values())
    return Need.through(peaks[0], peaks[1], state)


def stretched(batch: Batch, rows: int, length: int) -> dict[str, Tensor]:
    """Synthetic rows again, as many and as long as asked for: sequences are repeated along both dimensions, masks are
    ones, anything else is repeated along its rows."""
    made = {}
    for name, value in batch.items():
        sequence = value.ndim == 2 and not value.is_floating_point()
        times = -(-rows // len(value))
        if sequence:
            tiled = value.repeat(times, -(-length // value.shape[1]))[:rows, :length]
            made[name] = torch.ones_like(tiled) if "mask" in name else tiled
        else:
            made[name] = value.repeat(times, *(1,) * (value.ndim - 1))[:rows]
    return made


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Tensors alive at once while `run` runs, beyond those that were before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # The resident set would not show what the allocator had kept from before.
    results = profiler.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    peak = alive = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Of the GPU; or what the machine and every control group around this process leave. root: for tests."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [_available(root / "proc/meminfo"), *_left_in_groups(root)]
    return max(0, min(value for value in free if value is not None))


def _available(meminfo: Path) -> int:
    line = next(line for line in meminfo.read_text(encoding="ascii").splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def _left_in_groups(root: Path) -> list[int | None]:
    """Limits of cgroup v2 (each group from ours up) and v1, less what is used and could not be reclaimed."""
    base, left = root / "sys/fs/cgroup", []
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, names = (base, ("memory.max", "memory.current")) if not controllers else (
            base / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )  # fmt: skip
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            left.append(_left(folder, *names))
            if folder == top:
                break
    return left


def _left(folder: Path, limit: str, used: str) -> int | None:
    try:
        ceiling = (folder / limit).read_text(encoding="ascii").strip()
        if ceiling == "max":
            return None
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return int(ceiling) - int((folder / used).read_text(encoding="ascii")) + int(statistics.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
