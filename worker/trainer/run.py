"""One attempt at one job: load, adapt, check, loop, evaluate, export."""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from worker.trainer.checkpoint import State, read_checkpoint
from worker.trainer.control import Control
from worker.trainer.data import load_data
from worker.trainer.device import set_up_device
from worker.trainer.dp.engine import EngineError, GradientEngine
from worker.trainer.dp.products import FastLinear
from worker.trainer.dp.reduce import RankLost, rank_and_world_size
from worker.trainer.evaluate import evaluate
from worker.trainer.export import export
from worker.trainer.failure import StopRequested, TrainerFailure
from worker.trainer.job import (
    Job,
    PreparedPhase,
    adapt,
    all_parameters,
    check_plan,
    initial_values,
    load_job,
    with_memory,
)
from worker.trainer.loop import loss_curve, make_engines, train
from worker.trainer.memory import feature_bytes, physical_batch_tokens
from worker.trainer.messages import Failed, Finished, Notice, Started, Stopped
from worker.trainer.spec import TrainerSpec


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What is there before a row is read: loaded, adapted, checked, its physical batch measured."""

    job: Job
    phases: tuple[PreparedPhase, ...]
    engines: list[GradientEngine]
    began: float


def run(folder: Path, key: bytes, control: Control) -> None:
    """Executes the folder's job and says so over `control`; the results are in the folder.

    Raises TrainerFailure, or whatever else went wrong; `attempt` turns both into a message.
    """
    execute(prepare(folder, key, control))


def prepare(folder: Path, key: bytes, control: Control) -> Prepared:
    """All that needs no row: what fails here costs no budget, for it depends on none of them."""
    began = time.monotonic()
    spec = TrainerSpec.read(folder)
    check_plan(spec)
    job = load_job(folder, key, control, spec, set_up_device(spec.runtime))
    phases = adapt(job)
    engines = check(job, phases)
    features = feature_bytes(job, phases)
    tokens = physical_batch_tokens(job, phases, engines, features)
    return Prepared(with_memory(job, tokens, features), phases, engines, began)


def execute(prepared: Prepared) -> None:
    """Asks for the rows and reads them, then loop, evaluation and export."""
    job, phases, engines = prepared.job, prepared.phases, prepared.engines
    control, device = job.control, job.device
    state = read_checkpoint(job.folder, job.spec) or State()
    try:
        control.await_rows()
    except StopRequested:
        control.send(Stopped(state.step, dict(state.executed)))
        return
    data = load_data(job.folder, job.spec, job.task, job.randomness)
    for told in data.truncation:
        control.send(told)
    control.send(
        Started(
            device=device.torch_device.type,
            trainable_parameters=sum(parameter.numel() for parameter in all_parameters(phases).values()),
            total_parameters=sum(parameter.numel() for parameter in job.model.parameters()),
            max_physical_batch_tokens=job.spec.runtime.max_physical_batch_tokens,
            threads=device.threads,
            ranks=rank_and_world_size()[1],
        )
    )
    initial = initial_values(phases)
    try:
        with FastLinear():
            train(job, phases, engines, data.training, state)
            metrics = {**evaluate(job, data.evaluation, state), **loss_curve(job, phases, state)}
    except StopRequested:
        control.send(Stopped(state.step, dict(state.executed)))
        return
    if rank_and_world_size()[0] == 0:
        export(job, phases, initial, metrics)
    control.send(Finished(dict(state.executed), time.monotonic() - prepared.began))


def check(job: Job, phases: tuple[PreparedPhase, ...]) -> list[GradientEngine]:
    """A dry step of each phase on synthetic rows: TrainerFailure `missing_gradient_norm` before anything is spent."""
    try:
        engines = make_engines(job, phases)
    except EngineError as error:
        raise TrainerFailure("missing_gradient_norm", f"{error.code}: {error}") from error
    for prepared, engine in zip(phases, engines, strict=True):
        if engine.fallbacks:
            data = {"phase": prepared.phase.name, "parameters": len(engine.fallbacks)}
            job.control.send(Notice("slow_gradients", data))
    return engines


def attempt(folder: Path, key: bytes, control: Control) -> bool:
    """`run`, with every failure as a fixed code for the user and its traceback on standard error. True: no failure."""
    try:
        run(folder, key, control)
        return True
    except RankLost:  # as a crash: its code, where it has one, is the other rank's to tell
        traceback.print_exc(file=sys.stderr)
        return False
    except Exception as error:  # the one place where a failure becomes a code
        traceback.print_exc(file=sys.stderr)
        control.send(Failed(_code(error)))
        return False


def _code(error: Exception) -> str:
    if isinstance(error, TrainerFailure):
        return error.code
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out_of_memory"
    # CPU allocations fail as a plain RuntimeError with this text.
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return "out_of_memory"
    return "trainer_error"
