"""Checkpoints: all that the next step needs, nothing un-noised, bound to the job, its plan and its data.

A checkpoint is a folder of one safetensors and one JSON file, written under a temporary name, synced and renamed: a
folder with its final name is complete. Cached features are not in it: they are private, and are computed again.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from worker.trainer.dp.optimizers import WeightAverage
from worker.trainer.failure import TrainerFailure
from worker.trainer.spec import CHECKPOINTS_FOLDER, RESUME_FOLDER, TrainerSpec

_TENSORS, _STATE = "state.safetensors", "state.json"
_VERSION = 1


@dataclass(slots=True)
class State:
    """Where a job stands.

    executed: steps done of each part of the plan. phase: whose optimizer and average are in `tensors`.
    tensors: `weights/<name>`, `optimizer/<index>/<key>`, `average/<name>`, `centre`.
    """

    executed: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    average_count: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Steps done over all parts."""
        return sum(self.executed.values())


def capture(
    state: State, parameters: dict[str, nn.Parameter], optimizer: Optimizer | None, average: WeightAverage | None
) -> State:
    """`state` with the values of now: weights of everything that any phase trains, optimizer, average."""
    tensors = {name: tensor for name, tensor in state.tensors.items() if name == "centre"}
    tensors.update({f"weights/{name}": parameter.detach() for name, parameter in parameters.items()})
    if optimizer is not None:
        for index, values in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer/{index}/{key}": value for key, value in values.items() if value is not None})
    average_count = 0
    if average is not None:
        averaged = average.state_dict()
        average_count = averaged["count"]
        tensors.update({f"average/{name}": value for name, value in averaged["sums"].items()})
    return State(dict(state.executed), state.phase, average_count, tensors)


@torch.no_grad()
def restore_weights(state: State, parameters: dict[str, nn.Parameter]) -> None:
    """Writes a checkpoint's weights into the model; `resume_mismatch` where they are not the same parameters."""
    saved = _with_prefix(state, "weights/")
    if saved.keys() != parameters.keys() or any(saved[name].shape != p.shape for name, p in parameters.items()):
        raise TrainerFailure("resume_mismatch", "the checkpoint holds other parameters")
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


def restore_optimizer(state: State, optimizer: Optimizer, average: WeightAverage | None) -> None:
    """Writes a checkpoint's optimizer and average into those of its phase."""
    values: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _with_prefix(state, "optimizer/").items():
        index, _, key = name.partition("/")
        values.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": values})
    if average is not None and state.average_count:
        average.load_state_dict({"count": state.average_count, "sums": _with_prefix(state, "average/")})


def write_checkpoint(folder: Path, spec: TrainerSpec, state: State) -> None:
    """Writes `checkpoints/<step>/`; once this returns, it is on disk whole."""
    parent = folder / CHECKPOINTS_FOLDER
    parent.mkdir(exist_ok=True)
    final, temporary = parent / str(state.step), parent / f".{state.step}.tmp"
    for leftover in (temporary, final):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}, temporary / _TENSORS
    )
    description = {
        **_binding(spec),
        "executed": state.executed,
        "phase": state.phase,
        "average_count": state.average_count,
    }
    (temporary / _STATE).write_text(json.dumps(description), encoding="utf-8")
    for path in (temporary / _TENSORS, temporary / _STATE, temporary):
        _sync(path)
    temporary.rename(final)
    _sync(parent)


def read_checkpoint(folder: Path, spec: TrainerSpec) -> State | None:
    """The checkpoint in `resume/`; None without one, `resume_mismatch` where it was made of something else."""
    resume = folder / RESUME_FOLDER
    if not (resume / _STATE).exists():
        return None
    try:
        description: dict[str, Any] = json.loads((resume / _STATE).read_text(encoding="utf-8"))
        tensors = load_file(resume / _TENSORS)
        if any(description[name] != value for name, value in _binding(spec).items()):
            raise TrainerFailure("resume_mismatch")
        executed = {str(name): int(count) for name, count in description["executed"].items()}
        spec.plan.executed(executed)  # no more steps than were planned
        if not executed.keys() <= {part.name for part in spec.plan.parts}:
            raise TrainerFailure("resume_mismatch", "the checkpoint has steps of unknown parts")
        return State(executed, str(description["phase"]), int(description["average_count"]), tensors)
    except (OSError, KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise TrainerFailure("resume_mismatch", str(error)) from error


def keep_newest(folder: Path, count: int = 2) -> None:
    """Deletes all but the newest checkpoints, for a trainer that no supervisor watches."""
    steps = sorted(int(path.name) for path in (folder / CHECKPOINTS_FOLDER).iterdir() if path.name.isdigit())
    for step in steps[:-count]:
        shutil.rmtree(folder / CHECKPOINTS_FOLDER / str(step))


def _binding(spec: TrainerSpec) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "job_id": spec.job_id,
        "plan_digest": spec.plan.digest(),
        "dataset_digest": spec.dataset_digest,
        "base": spec.base.id,
    }


def _with_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.tensors.items() if name.startswith(prefix)}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
