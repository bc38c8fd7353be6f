"""One attempt at one job, loaded: what loop, evaluation and export work on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.catalog.adaptations import Adaptation, AttentiveHead, AttentiveLora, Head, Temperature, replaces_batch_norm
from app.catalog.memory import MOST_FEATURE_BYTES
from app.catalog.recipes import CENTRING, EVALUATION, Phase
from app.catalog.tasks import TASKS
from app.privacy.plan import GaussianRelease, SampledGaussian
from worker.trainer.adaptations.registry import ADAPTERS
from worker.trainer.control import Control
from worker.trainer.device import Device
from worker.trainer.dp.batching import physical_batches
from worker.trainer.dp.partition import in_rounds
from worker.trainer.dp.randomness import JobRandomness
from worker.trainer.dp.reduce import rank_and_world_size
from worker.trainer.failure import TrainerFailure
from worker.trainer.families.group_norm import with_group_norm
from worker.trainer.families.interface import AttentiveFamily, Family, PooledFamily, TokenFamily
from worker.trainer.families.registry import family_for
from worker.trainer.spec import TaskSpec, TrainerSpec
from worker.trainer.tasks.examples import Examples
from worker.trainer.tasks.interface import TrainerTask
from worker.trainer.tasks.registry import TRAINER_TASKS


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """The spec and everything that was loaded for it. most_feature_bytes: what there is room for of tokens' vectors
    (`memory.feature_bytes`): on another machine the next attempt may keep more or less, which moves rounding alone."""

    folder: Path
    spec: TrainerSpec
    control: Control
    device: Device
    randomness: JobRandomness
    family: Family
    model: PreTrainedModel
    task: TrainerTask
    most_feature_bytes: int = MOST_FEATURE_BYTES

    def batches(self, examples: Examples, rows: list[list[int]]) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """Physical batches on the device, with the rows that they hold. rows: in groups that stay together."""
        limit = self.spec.runtime.max_physical_batch_tokens
        for chosen in physical_batches(rows, examples.lengths, max_tokens=limit):
            yield chosen, self.task.batch(examples, chosen, self.device.torch_device)

    def shared_batches(
        self, examples: Examples, rows: list[list[int]]
    ) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """This rank's among the physical batches of one pass that all ranks make together.

        A collective: raises StopRequested on every rank, before a batch, once the supervisor asked for it.
        """
        limit = self.spec.runtime.max_physical_batch_tokens
        cut = list(physical_batches(rows, examples.lengths, max_tokens=limit))
        rank, world_size = rank_and_world_size()
        for chosen in in_rounds(cut, rank=rank, world_size=world_size):
            self.control.check()
            if chosen is not None:
                yield chosen, self.task.batch(examples, chosen, self.device.torch_device)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedPhase:
    """A phase, the plan's part that it executes, and what it trains, by the parameters' names in the model.

    on_features: whether nothing of the body trains, only what reads pooled vectors or tokens', or logits, so that those
    are computed once.
    """

    phase: Phase
    part: SampledGaussian
    parameters: dict[str, nn.Parameter]

    on_features: bool


def load_job(folder: Path, key: bytes, control: Control, spec: TrainerSpec, device: Device) -> Job:
    """Loads base and tokenizer. Raises TrainerFailure `base_model_invalid`."""
    path = Path(spec.base.path)
    family = family_for(spec.base.family, spec.task.type)
    model = load_model(family, spec)
    task = TRAINER_TASKS[spec.task.type](spec.task, path, family.max_length(model))
    task.prepare(model)
    return Job(folder, spec, control, device, JobRandomness(key), family, model, task)


def load_model(family: Family, spec: TrainerSpec) -> PreTrainedModel:
    """The base as every attempt starts from it; what is new in it follows from the wire's seed."""
    torch.manual_seed(spec.seed)
    for phase in spec.phases:
        if isinstance(phase.adaptation, AttentiveHead | AttentiveLora) and isinstance(family, AttentiveFamily):
            return family.load(Path(spec.base.path), spec.task, num_layers=phase.adaptation.num_layers)
    model = family.load(Path(spec.base.path), spec.task)
    for adaptation in (phase.adaptation for phase in spec.phases):
        if replaces_batch_norm(adaptation):
            model = with_group_norm(model, partial(_trained, family, adaptation))
    return model


def _trained(family: Family, adaptation: Adaptation, model: PreTrainedModel) -> list[str]:
    return ADAPTERS[adaptation.type].parameters(model, family, adaptation)


def adapt(job: Job) -> tuple[PreparedPhase, ...]:
    """Adds every phase's modules to the model, which then moves to the device; nothing requires a gradient yet."""
    names: list[list[str]] = []
    head = job.family.head_parameters(job.model)
    for phase in job.spec.phases:
        adaptation, adapter = phase.adaptation, ADAPTERS[phase.adaptation.type]
        names.append(adapter.parameters(job.model, job.family, adaptation) + (head if adapter.with_head else []))
        if not names[-1]:
            raise TrainerFailure("nothing_to_train")
    nn.Module.to(job.model, job.device.torch_device)
    job.model.requires_grad_(False)
    parameters = dict(job.model.named_parameters())
    prepared = []
    attentive = any(isinstance(phase.adaptation, AttentiveHead) for phase in job.spec.phases)
    for phase, chosen in zip(job.spec.phases, names, strict=True):
        part = job.spec.plan.part(phase.name)
        assert isinstance(part, SampledGaussian)
        # Whatever the rows: where noise is added, and what is told, must not show how many of them there are.
        on_features = isinstance(phase.adaptation, AttentiveHead | Temperature) or (
            isinstance(phase.adaptation, Head) and isinstance(job.family, PooledFamily | TokenFamily) and not attentive
        )  # one kind of features is kept: an attentive head's come first
        prepared.append(PreparedPhase(phase, part, {name: parameters[name] for name in chosen}, on_features))
    return tuple(prepared)


def reads_tokens(prepared: PreparedPhase) -> bool:
    """Whether the head of a pooled family's phase reads each token's vector, and weighs them itself."""
    return isinstance(prepared.phase.adaptation, AttentiveHead)


def reads_logits(prepared: PreparedPhase) -> bool:
    """Whether the phase reads the logits of what was trained before it: no features that are computed at the start."""
    return isinstance(prepared.phase.adaptation, Temperature)


def pooled_family(job: Job) -> PooledFamily:
    """The job's family, of a task whose head reads one vector a record."""
    assert isinstance(job.family, PooledFamily)
    return job.family


def check_plan(spec: TrainerSpec) -> None:
    """TrainerFailure `plan_mismatch` unless the plan's parts are exactly what the spec asks to execute."""
    plan = spec.plan
    expected: list[str] = [phase.name for phase in spec.phases]
    if plan.parts and plan.parts[0].name == CENTRING:
        expected.insert(0, CENTRING)
    if spec.evaluation == "private":
        expected.append(EVALUATION)
    if [part.name for part in plan.parts] != expected or not spec.phases:
        raise TrainerFailure("plan_mismatch", "the plan has other parts")
    for phase in spec.phases:
        part = plan.part(phase.name)
        if not isinstance(part, SampledGaussian) or part.dataset != "training":
            raise TrainerFailure("plan_mismatch", f"{phase.name} is not a phase over the training units")
        if (part.sample_rate, part.num_steps) != (phase.sample_rate, phase.num_steps):
            raise TrainerFailure("plan_mismatch", f"{phase.name} differs in sample rate or steps")
    if plan.mechanism == "none":
        if spec.evaluation == "private" or any(part.noise_multiplier for part in plan.parts):
            raise TrainerFailure("plan_mismatch", "noise without a mechanism")
    evaluated_on = "validation" if spec.data.has_validation_file else "training"
    for name, dataset in ((CENTRING, "training"), (EVALUATION, evaluated_on)):
        release = plan.part(name) if name in expected else None
        sensitivity = 1.0 if name == CENTRING else evaluation_sensitivity(spec.task)
        if release is not None and not (
            isinstance(release, GaussianRelease) and release.sensitivity >= sensitivity and release.dataset == dataset
        ):
            raise TrainerFailure("plan_mismatch", f"{name} is not a release of sensitivity {sensitivity}")
    if spec.evaluation != "none" and not (spec.data.has_validation_file or spec.data.num_held_out):
        raise TrainerFailure("plan_mismatch", "nothing to evaluate on")


def evaluation_sensitivity(task: TaskSpec) -> float:
    """L2 norm that one unit adds to the task's statistics."""
    return TASKS[task.type].sensitivity(len(task.labels), task.options)


def with_memory(job: Job, tokens: int, feature_bytes: int) -> Job:
    """The job with that physical batch, and that much for what it keeps of features."""
    runtime = dataclasses.replace(job.spec.runtime, max_physical_batch_tokens=tokens)
    spec = dataclasses.replace(job.spec, runtime=runtime)
    return dataclasses.replace(job, spec=spec, most_feature_bytes=feature_bytes)


def merge_adaptations(job: Job) -> None:
    """Folds what the phases added back into the model's own parameters, and the task's units into its head."""
    for adaptation in {phase.adaptation.type for phase in job.spec.phases}:
        ADAPTERS[adaptation].merge(job.model)
    if isinstance(job.family, PooledFamily):
        job.task.finish(job.family.head_module(job.model))


def initial_values(phases: tuple[PreparedPhase, ...]) -> dict[str, Tensor]:
    """Copies of everything that any phase trains, before the first step."""
    return {name: value.detach().clone() for name, value in all_parameters(phases).items()}


def all_parameters(phases: tuple[PreparedPhase, ...]) -> dict[str, nn.Parameter]:
    """Everything that any phase trains, by name."""
    return {name: parameter for prepared in phases for name, parameter in prepared.parameters.items()}
