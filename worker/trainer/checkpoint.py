"""Checkpoints: all that the next step needs, nothing un-noised, bound to the job, its plan and its data.

A checkpoint is a folder of one safetensors and one JSON file, written under a temporary name, synced and renamed: a
folder with its final name is complete. Cached features are not in it: they are private, and are computed again.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from app.privacy.plan import SampledGaussian
from worker.trainer.dp.optimizers import WeightAverage
from worker.trainer.failure import TrainerFailure
from worker.trainer.spec import CHECKPOINTS_FOLDER, RESUME_FOLDER, TrainerSpec

_TENSORS, _STATE, _LOSSES = "state.safetensors", "state.json", "losses/"
_VERSION = 1


@dataclass(slots=True)
class State:
    """Where a job stands.

    executed: steps done of each part of the plan. phase: whose optimizer and average are in `tensors`.
    losses: what each step of a phase with a loss curve released; they leave once their checkpoint is committed.
    max_grad_norm: the next step's norm bound, of phases that clip adaptively.
    tensors: `weights/<name>`, `optimizer/<index>/<key>`, `average/<name>`, `centre`.
    """

    executed: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    average_count: int = 0
    losses: dict[str, list[float]] = field(default_factory=dict)
    max_grad_norm: dict[str, float] = field(default_factory=dict)
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
    return replace(state, executed=dict(state.executed), average_count=average_count, tensors=tensors)


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
    losses = {f"{_LOSSES}{name}": torch.tensor(values, dtype=torch.float64) for name, values in state.losses.items()}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in {**state.tensors, **losses}.items()},
        temporary / _TENSORS,
    )
    description = {
        **_binding(spec),
        "executed": state.executed,
        "phase": state.phase,
        "average_count": state.average_count,
        "max_grad_norm": state.max_grad_norm,
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
        state = State(executed, str(description["phase"]), int(description["average_count"]), tensors=tensors)
        state.max_grad_norm = {str(name): float(c) for name, c in description.get("max_grad_norm", {}).items()}
        for name in [name for name in tensors if name.startswith(_LOSSES)]:
            state.losses[name.removeprefix(_LOSSES)] = tensors.pop(name).tolist()
        _check_riders(spec, state)
        return state
    except (OSError, KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise TrainerFailure("resume_mismatch", str(error)) from error


def _check_riders(spec: TrainerSpec, state: State) -> None:
    """`resume_mismatch` unless what rode along with the executed steps is all there."""
    for part in spec.plan.parts:
        count = state.executed.get(part.name, 0)
        rides = isinstance(part, SampledGaussian) and part.loss is not None
        adapts = isinstance(part, SampledGaussian) and part.quantile is not None
        known = len(state.losses.get(part.name, ()))
        if known != (count if rides else 0) or (part.name in state.max_grad_norm) != (adapts and count > 0):
            raise TrainerFailure("resume_mismatch", "what the steps released is not in the checkpoint")


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
