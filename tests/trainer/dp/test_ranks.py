"""I over ranks: two processes over gloo, each with its whole units of the drawn batch, take the same step as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.trainer.dp.training import DATA, NUM_UNITS, RANDOMNESS, Training
from worker.trainer.dp.reduce import rank_and_world_size
from worker.trainer.dp.sampler import poisson_batch

STEPS = 3
_PROGRAM = """
import sys
import torch
import torch.distributed as dist
from tests.trainer.dp.test_ranks import run_share
from worker.trainer.dp.reduce import from_first_rank, ranks_agree

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
torch.save(run_share(), sys.argv[3])
rank = dist.get_rank()
assert from_first_rank(rank == 0, rank == 1) == (True, False)
weights = [torch.ones(3, 2), torch.zeros(4)]
assert ranks_agree(weights)
weights[1][2] += 1e-38 * rank
assert not ranks_agree(weights)
dist.destroy_process_group()
"""


def run_share() -> torch.Tensor:
    """This rank's units of each drawn batch: every second one. Rank 1 has none in the last step."""
    rank, world_size = rank_and_world_size()
    training = Training()
    for step in range(STEPS):
        units = poisson_batch(
            RANDOMNESS, phase="main", step=step, num_units=NUM_UNITS, sample_rate=training.part.sample_rate
        )
        share = torch.from_numpy(units)[rank::world_size]
        if step == STEPS - 1 and world_size == 2:
            share = torch.from_numpy(units) if rank == 0 else share[:0]
        pieces = share.split(2) if len(share) else ()
        training.private_step.run(step, (({key: value[rows] for key, value in DATA.items()}, rows) for rows in pieces))
    return training.weights()


def test_two_ranks_take_the_step_of_one(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(tmp_path / "rendezvous"), str(rank), str(tmp_path / f"{rank}.pt")],
            env=environment,
            cwd=root,
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert torch.allclose(first, run_share(), atol=1e-6)
