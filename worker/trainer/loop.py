"""The training loop: centre the features, then execute the plan's phases step for step, with a checkpoint now and then.

Only noised sums reach a weight, by `PrivateStep`. A job without privacy takes the same way, with a plan that neither
clips nor noises.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from app.catalog.recipes import CENTRING
from app.privacy.loss_curve import described
from app.privacy.loss_curve import points as points_of
from app.privacy.plan import GaussianRelease
from worker.trainer.checkpoint import State, capture, keep_newest, restore_optimizer, restore_weights, write_checkpoint
from worker.trainer.data import Dataset
from worker.trainer.dp.batching import physical_batches
from worker.trainer.dp.engine import Batch, GradientEngine
from worker.trainer.dp.engines import make_engine
from worker.trainer.dp.optimizers import WeightAverage, learning_rate_factor, make_optimizer
from worker.trainer.dp.partition import units_of_rank
from worker.trainer.dp.randomness import INPUTS
from worker.trainer.dp.reduce import from_first_rank, rank_and_world_size, ranks_agree
from worker.trainer.dp.release import bounded_rows, gaussian_release
from worker.trainer.dp.sampler import poisson_batch, rows_of_step
from worker.trainer.dp.step import TOLERANCE, PrivateStep, noise_std
from worker.trainer.export import export_checkpoint
from worker.trainer.failure import StopRequested, TrainerFailure
from worker.trainer.families.attention import AttentiveHead as Attention
from worker.trainer.families.interface import AttentiveFamily, PooledFamily, TokenFamily
from worker.trainer.features import (
    Features,
    attended_vectors,
    logits,
    pooled_features,
    pooled_vectors,
    scaled_head,
    token_features,
)
from worker.trainer.job import Job, PreparedPhase, all_parameters, pooled_family, reads_logits, reads_tokens
from worker.trainer.messages import Checkpoint, Notice, Progress


def train(
    job: Job, phases: tuple[PreparedPhase, ...], engines: Sequence[GradientEngine], dataset: Dataset, state: State
) -> None:
    """Executes what `state` lacks of the plan's centring and phases; `state.executed` is true at every moment.

    engines: one for each phase, from `make_engines`.
    Raises StopRequested between two steps, after a checkpoint, once the supervisor asks for it.
    """
    parameters = all_parameters(phases)
    if state.tensors:
        restore_weights(state, parameters)
    features = _features(job, phases, dataset, state)
    resumed = [prepared.phase.name for prepared in phases].index(state.phase) if state.phase else 0
    last_checkpoint, kept = time.monotonic(), dict(state.executed)
    for prepared, engine in list(zip(phases, engines, strict=True))[resumed:]:
        part, name = prepared.part, prepared.phase.name
        following = phases[phases.index(prepared) :]
        if not any(_reads_features(later) for later in following):
            features = None  # gigabytes, of tokens
        if reads_logits(prepared) and state.executed.get(name, 0) < part.num_steps:
            _tell(job, dataset)
            features = logits(job, dataset)
        # What is asked to stop while rows pass through the body stops there.
        pass_follows = len(following) > 1 and reads_logits(following[1])
        require_gradients(job, prepared)
        optimizer = _optimizer(job, prepared)
        rates = [group["lr"] for group in optimizer.param_groups]
        decay = prepared.phase.averaging
        average = None if decay is None else WeightAverage(prepared.parameters, decay)
        if state.phase == name:
            restore_optimizer(state, optimizer, average)
            state.tensors = {key: value for key, value in state.tensors.items() if key == "centre"}
        state.phase = name
        step = PrivateStep(
            engine,
            optimizer,
            _names_in_module(job, prepared),
            plan=job.spec.plan,
            part=part,
            randomness=job.randomness,
            half_precision=_half_precision(job, prepared),
        )
        step.max_grad_norm = state.max_grad_norm.get(name, step.max_grad_norm)
        for index in range(state.executed.get(name, 0), part.num_steps):
            units = poisson_batch(
                job.randomness, phase=name, step=index, num_units=dataset.num_units, sample_rate=part.sample_rate
            )
            factor = learning_rate_factor(
                prepared.phase.schedule,
                index,
                num_steps=part.num_steps,
                num_warmup_steps=prepared.phase.num_warmup_steps,
            )
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            job.control.await_allowed(progress(job, state))
            released = step.run(index, micro_batches(job, prepared, dataset, features, units, index))
            if average is not None:
                average.update(prepared.parameters)
            state.executed[name] = index + 1
            if released.loss is not None:
                state.losses.setdefault(name, []).append(released.loss)
            if part.quantile is not None:
                state.max_grad_norm[name] = step.max_grad_norm
            last = prepared is phases[-1] and index + 1 == part.num_steps
            job.control.progress(progress(job, state), last=last)
            due = time.monotonic() - last_checkpoint >= job.spec.checkpoint_seconds
            stop, due = from_first_rank(job.control.stop_requested, due)
            publish = state.step in job.spec.published_steps
            if publish and rank_and_world_size()[0] == 0:
                export_checkpoint(job, prepared, state, average, loss_curve(job, phases, state))
            if last or stop or publish or due or (pass_follows and index + 1 == part.num_steps):
                captured = capture(state, parameters, optimizer, average)
                _checkpoint(job, captured, prepared.parameters, _loss_points(job, phases, state, kept))
                last_checkpoint, kept = time.monotonic(), dict(state.executed)
            if stop:
                raise StopRequested
        if average is not None:
            average.copy_to(prepared.parameters)


def make_engines(job: Job, phases: tuple[PreparedPhase, ...]) -> list[GradientEngine]:
    """The engine of each phase, after a dry step of each on synthetic rows.

    Raises EngineError where a trainable parameter has no exact norm per unit.
    """
    examples = job.task.synthetic(job.model, rows=4)
    batch = job.task.batch(examples, range(len(examples)), job.device.torch_device)
    engines: list[GradientEngine] = []
    for prepared in phases:
        example = batch
        if prepared.on_features:
            with torch.no_grad():
                vectors = _vectors(job, prepared, batch)
            example = vectors | job.task.targets(examples, range(len(examples)), job.device.torch_device)
        require_gradients(job, prepared)
        engines.append(
            make_engine(
                _head_module(job, prepared) if prepared.on_features else job.model,
                list(_names_in_module(job, prepared)),
                partial(_feature_loss if prepared.on_features else _loss, job),
                clipping=prepared.part.clipping,
                max_grad_norm=prepared.part.max_grad_norm,
                example=example,
                autocast_dtype=job.device.dtype if _half_precision(job, prepared) else None,
            )
        )
    return engines


def _half_precision(job: Job, prepared: PreparedPhase) -> bool:
    """Features, and what trains on them, are float32 throughout: a sum over all units would drift too far.

    So is adaptive clipping: where many norms are near the bound, rounding would turn several units' bits.
    """
    return job.device.half_precision and not prepared.on_features and prepared.part.quantile is None


def _loss(job: Job, model: nn.Module, batch: Batch) -> Tensor:
    return job.task.loss(job.task.outputs(model, batch), batch)


def _feature_loss(job: Job, head: nn.Module, batch: Batch) -> Tensor:
    inputs = [batch["features"], *([batch["mask"]] if isinstance(head, Attention) else [])]
    return job.task.loss(head(*inputs).float(), batch)


def _vectors(job: Job, prepared: PreparedPhase, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the phase's head reads of one batch, as `Features.of_rows` gives it."""
    if reads_tokens(prepared):
        assert isinstance(job.family, AttentiveFamily)
        return {"features": job.family.states(job.model, batch), "mask": batch["attention_mask"]}
    if reads_logits(prepared):
        family = pooled_family(job)
        vectors = family.features(job.model, family.pooled(job.model, batch))
        return {"features": scaled_head(job).unscaled(vectors)}
    if isinstance(job.family, PooledFamily):
        return {"features": job.family.features(job.model, job.family.pooled(job.model, batch)).float()}
    assert isinstance(job.family, TokenFamily)
    return {"features": job.family.token_vectors(job.model, batch)}


def _head_module(job: Job, prepared: PreparedPhase) -> nn.Module:
    """What a phase on features differentiates; its parameters are the model's."""
    if reads_tokens(prepared):
        assert isinstance(job.family, AttentiveFamily)
        return job.family.attentive_head(job.model)
    if reads_logits(prepared):
        return scaled_head(job).scale
    assert isinstance(job.family, PooledFamily | TokenFamily)
    return job.family.head_module(job.model)


def require_gradients(job: Job, prepared: PreparedPhase) -> None:
    """From here on exactly the phase's parameters require gradients."""
    job.model.requires_grad_(False)
    for parameter in prepared.parameters.values():
        parameter.requires_grad_(True)


def _names_in_module(job: Job, prepared: PreparedPhase) -> dict[str, nn.Parameter]:
    """The phase's parameters under their names in the module that its engine differentiates."""
    if not prepared.on_features:
        return prepared.parameters
    trained = set(map(id, prepared.parameters.values()))
    return {name: each for name, each in _head_module(job, prepared).named_parameters() if id(each) in trained}


def _optimizer(job: Job, prepared: PreparedPhase) -> Optimizer:
    phase = prepared.phase
    names = set(job.family.head_parameters(job.model))
    head = [parameter for name, parameter in prepared.parameters.items() if name in names]
    body = [parameter for name, parameter in prepared.parameters.items() if name not in names]
    rate = phase.head_learning_rate if body else phase.learning_rate
    groups = [{"params": group, "lr": lr} for group, lr in ((body, phase.learning_rate), (head, rate)) if group]
    return make_optimizer(
        phase.optimizer,
        groups,
        learning_rate=phase.learning_rate,
        weight_decay=phase.weight_decay,
        momentum=phase.momentum,
    )


def micro_batches(
    job: Job, prepared: PreparedPhase, dataset: Dataset, features: Features | None, units: np.ndarray, step: int
) -> Iterator[tuple[Batch, Tensor]]:
    """The drawn units' rows of a step, in physical batches of whole units, with the unit of each row."""
    most = job.spec.plan.privacy_unit.max_records_per_unit
    phase = prepared.phase.name
    rows = [
        rows_of_step(
            job.randomness, dataset.rows_of_unit[unit], unit=int(unit), max_rows=most, phase=phase, step=step
        ).tolist()
        for unit in units
    ]
    rank, world_size = rank_and_world_size()
    on_features = features if prepared.on_features else None
    tokens = dataset.examples.lengths if on_features is None else on_features.lengths
    rows = [rows[unit] for unit in units_of_rank(rows, tokens, rank=rank, world_size=world_size)]
    device = job.device.torch_device
    if on_features is None:
        drawn = [row for group in rows for row in group]
        examples = job.task.at_step(dataset.examples, drawn, job.randomness.subkey(phase, step, INPUTS))
        for chosen, batch in job.batches(examples, rows):
            yield batch, torch.from_numpy(dataset.unit_of_row[chosen]).to(device)
        return
    for chosen in physical_batches(rows, tokens, max_tokens=job.spec.runtime.max_physical_batch_tokens):
        batch = on_features.of_rows(chosen) | job.task.targets(dataset.examples, chosen, device)
        yield batch, torch.from_numpy(dataset.unit_of_row[chosen]).to(device)


def _reads_features(prepared: PreparedPhase) -> bool:
    """Whether it reads what is computed before the first step."""
    return prepared.on_features and not reads_logits(prepared)


def _needs_features(job: Job, phases: tuple[PreparedPhase, ...], state: State) -> bool:
    """Whether a step is left that reads them: the centring, or one of a phase that trains only the head."""
    plan = job.spec.plan
    centring = plan.parts[0].name == CENTRING and not state.executed.get(CENTRING)
    return centring or any(
        _reads_features(prepared) and state.executed.get(prepared.phase.name, 0) < prepared.part.num_steps
        for prepared in phases
    )


def _tell(job: Job, dataset: Dataset) -> None:
    job.control.send(Notice("computing_features", {"num_units": dataset.num_units}))


def _features(job: Job, phases: tuple[PreparedPhase, ...], dataset: Dataset, state: State) -> Features | None:
    """What the heads read, after the centring; None where no step is left that reads it."""
    needed = _needs_features(job, phases, state)
    if needed:
        _tell(job, dataset)
    if not isinstance(job.family, PooledFamily):
        return token_features(job, dataset) if needed else None
    if any(prepared.on_features and reads_tokens(prepared) for prepared in phases):
        tokens = token_features(job, dataset) if needed else None
        _centre(job, dataset, None if tokens is None else attended_vectors(job, tokens), state)
        return tokens
    pooled = pooled_vectors(job, dataset) if needed else None
    _centre(job, dataset, pooled, state)
    return None if pooled is None else pooled_features(job, pooled)


def _centre(job: Job, dataset: Dataset, pooled: Tensor | None, state: State) -> None:
    """Releases the mean over units of their mean vectors, once, and puts it into the model; a resumed job takes the
    released one."""
    parts = job.spec.plan.parts
    if parts[0].name != CENTRING:
        return
    if not state.executed.get(CENTRING):
        assert isinstance(parts[0], GaussianRelease)
        assert pooled is not None
        # A unit's mean of vectors bounded to norm 1 is bounded by it too: the release's sensitivity.
        bounded = bounded_rows(pooled / pooled.shape[1] ** 0.5, 1.0)
        total = (bounded * dataset.weight_of_row.to(bounded.device)[:, None]).sum(0)
        job.control.await_allowed(progress(job, state))
        if parts[0].noise_multiplier > 0.0:
            # Float32 vectors depend in their last bits on the batch that a unit shares with others, as gradients do.
            total = gaussian_release(job.randomness, parts[0], total, tolerance=TOLERANCE)
        state.tensors["centre"] = (total / job.spec.plan.num_units).to(torch.float32)
        state.executed[CENTRING] = 1
        job.control.progress(progress(job, state))
    pooled_family(job).set_centre(job.model, state.tensors["centre"].to(job.device.torch_device))


def loss_curve(job: Job, phases: tuple[PreparedPhase, ...], state: State) -> dict[str, Any]:
    """The whole curve, for metrics.json; empty where the plan has none."""
    points = _loss_points(job, phases, state, {})
    return {"train_loss_curve": [described(job.spec.plan, point) for point in points]} if points else {}


def _loss_points(
    job: Job, phases: tuple[PreparedPhase, ...], state: State, kept: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Points of the loss curve that are complete. kept: steps of the last checkpoint, whose points are told already."""
    plan = job.spec.plan
    stds = {
        prepared.phase.name: noise_std(plan, prepared.part, "loss", half_precision=_half_precision(job, prepared))
        / plan.expected_batch_size(prepared.part)
        for prepared in phases
        if prepared.part.loss is not None
    }
    return points_of(plan, state.losses, stds, after=kept)


def _checkpoint(job: Job, state: State, parameters: Mapping[str, nn.Parameter], losses: list[dict[str, Any]]) -> None:
    if not ranks_agree(parameters.values()):
        raise TrainerFailure("ranks_disagree")
    if rank_and_world_size()[0] > 0:
        return
    write_checkpoint(job.folder, job.spec, state)
    job.control.send(Checkpoint(state.step, dict(state.executed), losses))
    if not job.control.attached:
        keep_newest(job.folder)


def progress(job: Job, state: State) -> Progress:
    """Where the job stands, as a message."""
    total = sum(part.num_steps for part in job.spec.plan.parts)
    return Progress(state.step, total, state.phase or CENTRING, dict(state.executed))
