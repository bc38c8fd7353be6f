"""The physical batch from a measurement: the need's line, what is free, and that it changes no model."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.catalog.adaptations import AttentiveHead, AttentiveLora
from app.catalog.recipes import HEAD_PHASE, MAIN_PHASE, Phase
from tests.trainer.jobs import DEVICE, NUM_HELD_OUT, NUM_ROWS, MadeJob, make_job, rows
from worker.trainer import loop, memory
from worker.trainer.control import Control
from worker.trainer.device import set_up_device
from worker.trainer.job import Job, PreparedPhase, adapt, load_job
from worker.trainer.loop import make_engines
from worker.trainer.memory import (
    LEAST_TOKENS,
    Need,
    feature_bytes,
    free_bytes,
    measured,
    peak_bytes,
    physical_batch_tokens,
    stretched,
)
from worker.trainer.messages import Message, Progress, Started
from worker.trainer.run import run

CPU = torch.device("cpu")


@given(
    fixed=st.integers(0, 10**6),
    per_token=st.integers(1, 10**5),
    state=st.integers(0, 10**6),
    free=st.integers(0, 10**10),
    most=st.sampled_from([64, 4096, 32768]),
)
def test_what_is_chosen_fits_and_no_step_more_would(
    fixed: int, per_token: int, state: int, free: int, most: int
) -> None:
    need = Need.through((100, fixed + 100 * per_token), (300, fixed + 300 * per_token), state)
    tokens = need.tokens_within(free, most)
    assert tokens % LEAST_TOKENS == 0
    assert LEAST_TOKENS <= tokens <= most
    if tokens > LEAST_TOKENS:
        assert fixed + state + tokens * per_token <= free
    if tokens < most:
        assert fixed + state + (tokens + LEAST_TOKENS) * per_token > free


def test_peak_counts_what_lives_at_once() -> None:
    mebibyte = 1 << 18  # float32 elements

    def run() -> None:
        first = torch.ones(4 * mebibyte)
        second = first + 1.0
        del first
        third = second + 1.0
        del second, third
        torch.ones(mebibyte)

    assert peak_bytes(run, CPU) == pytest.approx(8 << 20, rel=0.01)


def test_stretched_rows_are_as_many_and_as_long_as_asked_for() -> None:
    batch = {
        "input_ids": torch.tensor([[7, 8, 0], [9, 5, 6]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
        "labels": torch.tensor([0, 1]),
        "pixel_values": torch.zeros(2, 3, 4, 4),
    }
    made = stretched(batch, 5, 8)
    assert made["input_ids"].tolist()[0] == [7, 8, 0, 7, 8, 0, 7, 8]
    assert bool((made["attention_mask"] == 1).all())
    assert made["labels"].tolist() == [0, 1, 0, 1, 0]
    assert made["pixel_values"].shape == (5, 3, 4, 4)


def _machine(root: Path, **files: str) -> Path:
    for name, content in {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable: 50000 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_free_memory_is_the_machines(tmp_path: Path) -> None:
    assert free_bytes(CPU, _machine(tmp_path)) == 50_000 * 1024


def test_free_memory_is_what_every_group_around_leaves(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "0::/outer/inner\n",
        "sys/fs/cgroup/outer/inner/memory.max": "max\n",
        "sys/fs/cgroup/outer/memory.max": "30000000\n",
        "sys/fs/cgroup/outer/memory.current": "10000000\n",
        "sys/fs/cgroup/outer/memory.stat": "anon 1\ninactive_file 5\n",
    }
    assert free_bytes(CPU, _machine(tmp_path, **group)) == 20_000_005


def test_free_memory_under_the_older_groups(tmp_path: Path) -> None:
    group = {
        "proc/self/cgroup": "8:memory:/box\n2:cpu:/box\n",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "1000\n",
        "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "400\n",
        "sys/fs/cgroup/memory/box/memory.stat": "inactive_file 100\n",
    }
    assert free_bytes(CPU, _machine(tmp_path, **group)) == 700


def on_cpu(made: MadeJob) -> MadeJob:
    """The same job, wherever the tests' others run."""
    spec = dataclasses.replace(made.spec, runtime=dataclasses.replace(made.spec.runtime, device="cpu"))
    spec.write(made.folder)
    return MadeJob(made.folder, spec)


def loaded(
    folder: Path, base: Path, adaptation: str = "head", tokens: int = 0, **fields: Any
) -> tuple[Job, tuple[PreparedPhase, ...], list]:
    """On the CPU, whose figures these are: a GPU's allocator rounds what a tiny model takes."""
    made = on_cpu(make_job(folder, base, adaptation=adaptation, tokens=tokens, **fields))
    job = load_job(made.folder, bytes(32), Control(None), made.spec, set_up_device(made.spec.runtime))
    phases = adapt(job)
    return job, phases, make_engines(job, phases)


@pytest.mark.parametrize("adaptation", ["head", "full", "lora"])
def test_the_line_foretells_a_larger_batch(tmp_path: Path, base: Path, adaptation: str) -> None:
    job, phases, engines = loaded(tmp_path / "job", base, adaptation)
    near = measured(job, phases[-1], engines[-1], rows=(8, 24), length=16)
    far = measured(job, phases[-1], engines[-1], rows=(64, 96), length=16)
    foretold, found = (need.fixed + need.per_token * 96 * 16 for need in (near, far))
    assert found == pytest.approx(foretold, rel=0.25)
    assert near.per_token > 0


def test_little_memory_makes_small_batches_and_the_operators_word_holds(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, phases, engines = loaded(tmp_path / "measured", base, "full")
    assert physical_batch_tokens(job, phases, engines) == memory.MOST_BATCH_TOKENS["cpu"]
    need = measured(job, phases[-1], engines[-1], rows=(2, 6), length=16)
    free = need.fixed + need.state + 1000 * need.per_token
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(free / 0.5))
    assert 500 < physical_batch_tokens(job, phases, engines) <= 1000
    said, phases, engines = loaded(tmp_path / "said", base, "full", tokens=77)
    assert physical_batch_tokens(said, phases, engines) == 77


ON_TOKENS = (Phase(HEAD_PHASE, AttentiveHead(1), 0.5, 2, 0.1, 0.2),)
VECTOR = 4 * 16  # bytes


def test_what_is_kept_of_tokens_is_counted_before_the_batch_is_chosen(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, phases, engines = loaded(tmp_path / "job", base, phases=ON_TOKENS)
    every = (NUM_ROWS - NUM_HELD_OUT) * 16 * VECTOR  # of rows as long as they may be
    assert feature_bytes(job, phases) == every
    need = measured(job, phases[-1], engines[-1], rows=(2, 6), length=16)
    beside = need.fixed + need.state + 1000 * need.per_token
    monkeypatch.setattr(memory, "free_bytes", lambda device: int((beside + every) / 0.5))
    assert feature_bytes(job, phases) == every
    beside_it, alone = (physical_batch_tokens(job, phases, engines, kept) for kept in (every, 0))
    assert 500 < beside_it <= 1000 < alone
    monkeypatch.setattr(memory, "free_bytes", lambda device: 400 * VECTOR)
    assert feature_bytes(job, phases) == 100 * VECTOR, "no more than half of what may be planned with"


def test_of_vectors_of_rows_all_are_counted(tmp_path: Path, base: Path) -> None:
    job, phases, _ = loaded(tmp_path / "job", base, "head")
    assert feature_bytes(job, phases) == 2 * (NUM_ROWS - NUM_HELD_OUT) * VECTOR
    job, phases, _ = loaded(tmp_path / "full", base, "full")
    assert feature_bytes(job, phases[-1:]) == 0


def test_what_is_kept_does_not_hang_on_how_many_rows_persons_have(tmp_path: Path, base: Path) -> None:
    made = [
        loaded(
            tmp_path / str(most), base, phases=ON_TOKENS, units=[f"p{row % most}" for row in range(40)], data=rows(40),
            num_held_out=0, evaluation="none",
        )
        for most in (20, 10)
    ]  # fmt: skip
    assert {feature_bytes(job, phases) for job, phases, _ in made} == {memory.MOST_FEATURE_BYTES}


def test_little_memory_keeps_few_vectors(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    token_features = loop.token_features

    def noted(job: Job, dataset: Any) -> Any:
        features = token_features(job, dataset)
        kept.append((len(features.vectors), int(dataset.examples.lengths.sum())))
        return features

    monkeypatch.setattr(loop, "token_features", noted)
    for free in (None, 400 * VECTOR, 0):
        if free is not None:
            monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        run(on_cpu(make_job(tmp_path / str(free), base, phases=ON_TOKENS)).folder, bytes(32), Control(None))
    (every, of_all), (some, _), (none, _) = kept
    assert every == of_all
    assert 50 < some <= 100
    assert none == 0


_MAIN = Phase(MAIN_PHASE, AttentiveLora(1, rank=2, alpha=4.0), 0.5, 2, 1e-2, 1e-2)


def test_the_features_are_room_to_the_phases_behind_them(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, phases, engines = loaded(tmp_path / "job", base, phases=(*ON_TOKENS, _MAIN))
    heads, main = (measured(job, phases[at], engines[at], rows=(2, 6), length=16) for at in (0, 1))
    free = main.fixed + main.state + 1000 * main.per_token
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(free / 0.5))
    alone = physical_batch_tokens(job, phases, engines, 0)
    assert 500 < alone <= 1000
    # Beside so much the frozen body still takes a larger batch than that, but training of it would not.
    features = int(free - heads.fixed - heads.state - 1100 * heads.per_token)
    assert main.tokens_within(free - features, 10**6) < 900
    assert physical_batch_tokens(job, phases, engines, features) == alone
    features = int(free - heads.fixed - heads.state - 300 * heads.per_token)
    assert physical_batch_tokens(job, phases, engines, features) in range(LEAST_TOKENS + 1, 301)


def test_the_features_are_gone_once_no_phase_is_left_that_reads_them(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_features, kept, alive = loop.token_features, [], []

    def noted(job: Job, dataset: Any) -> Any:
        features = token_features(job, dataset)
        kept.append(weakref.ref(features.vectors))
        return features

    class Looking(Control):
        def await_allowed(self, message: Progress) -> None:
            alive.append((message.phase, kept[0]() is not None))

    monkeypatch.setattr(loop, "token_features", noted)
    run(make_job(tmp_path / "job", base, phases=(*ON_TOKENS, _MAIN)).folder, bytes(32), Looking(None))
    assert {(HEAD_PHASE, True), (MAIN_PHASE, False)} <= set(alive)
    assert (MAIN_PHASE, True) not in alive


_SHAPES = """
import os, sys
from worker.trainer.__main__ import main
assert main([]) == 0, "a spare that is never needed, but ready"
import torch
weight = torch.ones(16, 16)
for rows in (*range(1, 401), 399, 1):
    print("rows", rows, flush=True)
    torch.ops.mkldnn._linear_pointwise(torch.ones(rows, 16), weight, None, "none", [], "")
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_a_trainer_keeps_compiled_products_of_few_shapes_only() -> None:
    """By oneDNN's own account of what it compiles: what it kept lay between the tensors, and the heap grew by holes."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "ONEDNN_VERBOSE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", _SHAPES], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    *_, recent, first = done.stdout.split("rows ")
    assert recent.startswith("399")
    assert "create:cache_miss" not in recent, "of the last shapes they are kept"
    assert first.startswith("1\n")
    assert "create:cache_miss" in first


_RANK = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from tests.trainer.test_memory import loaded
from worker.trainer import memory

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
job, phases, engines = loaded(Path(sys.argv[3]) / f"job{rank}", Path(sys.argv[4]), "full")
need = memory.measured(job, phases[-1], engines[-1], rows=(2, 6), length=16)
tokens = (3000, 1000)[rank]  # what would fit this rank alone; a rank has half of half of what is free
memory.free_bytes = lambda device: 4 * int(need.fixed + need.state + tokens * need.per_token)
print(memory.physical_batch_tokens(job, phases, engines))
late, said = Path(sys.argv[3]) / "late", loaded(Path(sys.argv[3]) / f"said{rank}", Path(sys.argv[4]), "full", tokens=77)
if rank:
    time.sleep(1.0)
    late.touch()
print(memory.physical_batch_tokens(*said), late.exists())
dist.destroy_process_group()
"""


def test_ranks_agree_on_what_fits_the_one_with_least_memory(tmp_path: Path, base: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), str(tmp_path / "rendezvous"), str(tmp_path), str(base)],
            env=environment,
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [rank.communicate(timeout=300)[0].split() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert told[0] == told[1]
    assert 500 < int(told[0][0]) <= 1000
    assert told[0][1:] == ["77", "True"], "none goes on, to read rows, before the last is as far"


def test_the_trainer_says_what_it_measured(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Message] = []
    control = Control(None)
    monkeypatch.setattr(control, "send", heard.append)
    run(make_job(tmp_path / "job", base, tokens=0).folder, bytes(32), control)
    started = next(message for message in heard if isinstance(message, Started))
    assert started.max_physical_batch_tokens == memory.MOST_BATCH_TOKENS[DEVICE]
