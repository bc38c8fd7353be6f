"""The bundle: a model that plain transformers loads, from an exact list of files, checked by loading it again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from app.catalog.families import GROUP_NORM_CODE
from worker.trainer.checkpoint import State
from worker.trainer.dp.optimizers import WeightAverage
from worker.trainer.failure import TrainerFailure
from worker.trainer.job import Job, PreparedPhase, adapt, all_parameters, load_model, merge_adaptations
from worker.trainer.model_card import model_card
from worker.trainer.spec import METRICS_FILE, MODEL_FOLDER, TAKEN_FOLDER
from worker.trainer.tasks.registry import TRAINER_TASKS

#: All that a bundle may hold; what else a library writes is left out. (The supervisor adds privacy_report.json.)
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)
BUNDLE_FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    GROUP_NORM_CODE,
    *PROCESSOR_FILES,
    "README.md",
    "metrics.json",
)


def export(job: Job, phases: tuple[PreparedPhase, ...], initial: dict[str, Tensor], metrics: dict[str, Any]) -> None:
    """Writes `results/`: the bundle and metrics.json.

    initial: what each trained parameter was before the first step. Raises TrainerFailure `export_check_failed` where
    one has not moved, or the reloaded bundle answers otherwise than the trained model.
    """
    _check_moved(job, phases, initial)
    _check_finite(phases)
    nn.Module.to(job.model, "cpu")
    _write(job, job.folder, metrics, None)


def export_checkpoint(
    job: Job, phase: PreparedPhase, state: State, average: WeightAverage | None, curve: dict[str, Any]
) -> None:
    """Writes `taken/<step>/results/`: the bundle of the weights of now, on the CPU, of a model of its own.

    phase: the one at work. What is averaged is exported as its average, as it will be at the phase's end. The model
    that trains is only read. curve: of the losses until here, as metrics.json has it.
    Raises TrainerFailure `export_check_failed` as `export` does.
    """
    with torch.random.fork_rng(devices=[]):
        fresh = dataclasses.replace(
            job,
            model=load_model(job.family, job.spec),
            device=dataclasses.replace(job.device, torch_device=torch.device("cpu")),
        )
        fresh.task.prepare(fresh.model)
        phases = adapt(fresh)
    fresh.model.load_state_dict(job.model.state_dict())
    if average is not None:
        average.copy_to({name: all_parameters(phases)[name] for name in phase.parameters})
    _check_finite(phases)
    metrics = {"released": "none", "reason": "metrics are released once, with the finished model", **curve}
    _write(fresh, job.folder / TAKEN_FOLDER / str(state.step), metrics, state.step)


def _write(job: Job, root: Path, metrics: dict[str, Any], step: int | None) -> None:
    """The bundle of `job.model`, which lies on the CPU and is changed by it, below `root`. step: of a checkpoint."""
    merge_adaptations(job)
    answers = _synthetic_answers(job, job.model)
    final = root / MODEL_FOLDER
    temporary = final.with_name(f".{final.name}.tmp")
    for leftover in (temporary, final):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    job.model.config._name_or_path = job.spec.base.id  # not the path of this machine
    job.model.save_pretrained(temporary, max_shard_size="100GB")
    _save_processor(job, temporary)
    card = model_card(job.spec, job.task, metrics, step, code=(temporary / GROUP_NORM_CODE).exists())
    (temporary / "README.md").write_text(card, encoding="utf-8")
    content = json.dumps(metrics, ensure_ascii=False, indent=2)
    for path in (temporary / "metrics.json", root / METRICS_FILE):
        path.write_text(content, encoding="utf-8")
    for path in temporary.iterdir():
        if path.name not in BUNDLE_FILES:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _check_reloaded(job, temporary, answers)
    for path in (*temporary.iterdir(), root / METRICS_FILE):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    temporary.rename(final)


def _save_processor(job: Job, folder: Path) -> None:
    """One that no row has been through: a tokenizer keeps how it was last called, and what was cut depends on rows."""
    spec = job.spec
    task = TRAINER_TASKS[spec.task.type](spec.task, Path(spec.base.path), job.family.max_length(job.model))
    processor = task.processor
    if isinstance(processor, PreTrainedTokenizerBase):
        if processor.is_fast:  # nor how the base's was called
            processor.backend_tokenizer.no_truncation()
            processor.backend_tokenizer.no_padding()
        processor.model_max_length = spec.task.max_length
        processor.name_or_path = spec.base.id
        for option in ("is_local", "local_files_only"):
            processor.init_kwargs.pop(option, None)  # how it was loaded here
    processor.save_pretrained(folder)


def _check_moved(job: Job, phases: tuple[PreparedPhase, ...], initial: dict[str, Tensor]) -> None:
    private = job.spec.plan.mechanism != "none"
    # LoRA's B is zero at the first step, and A has no gradient then.
    single = phases[-1].part.num_steps == 1
    for name, parameter in all_parameters(phases).items():
        may_rest = not private and (name.endswith(job.family.unmovable) or (single and ".lora_A." in name))
        if not may_rest and torch.equal(parameter.detach(), initial[name]):
            raise TrainerFailure("export_check_failed", f"{name} was trained and did not change")


def _check_finite(phases: tuple[PreparedPhase, ...]) -> None:
    for name, parameter in all_parameters(phases).items():
        if not bool(torch.isfinite(parameter).all()):
            raise TrainerFailure("export_check_failed", f"{name} is not finite")


def _check_reloaded(job: Job, folder: Path, answers: Tensor) -> None:
    try:
        reloaded = job.family.auto_class.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        reloaded.train(False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise TrainerFailure("export_check_failed", str(error)) from error
    labels = job.spec.task.labels
    if tuple(reloaded.config.id2label.get(index) for index in range(len(labels))) != labels:
        raise TrainerFailure("export_check_failed", "the class names are not those of the job")
    if not torch.allclose(_synthetic_answers(job, reloaded), answers, rtol=1e-4, atol=1e-5):
        raise TrainerFailure("export_check_failed", "the reloaded model answers otherwise")


@torch.inference_mode()
def _synthetic_answers(job: Job, model: Any) -> Tensor:
    examples = job.task.synthetic(job.model, rows=8)
    return job.task.outputs(model, job.task.batch(examples, range(len(examples)), torch.device("cpu")))
