"""Exports that plain transformers loads: the bundle as it is, and its weights in half precision."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from app.catalog.families import GROUP_NORM_CODE
from worker.exporter import card
from worker.exporter.architectures import load
from worker.exporter.formats.maker import Made, Maker
from worker.exporter.reference import Batch, Reference, answer
from worker.exporter.spec import ExportSpec
from worker.trainer.tasks.interface import FOLDER

WEIGHTS = "model.safetensors"


def usage(reference: Reference) -> str:
    """The lines of Python of the model's own card; where it has none, two that load it."""
    loader = reference.kind.loader.__name__
    brings_code = (reference.folder / GROUP_NORM_CODE).exists()
    trust = ", trust_remote_code=True" if brings_code else ""
    loads = f'from transformers import {loader}\n\nmodel = {loader}.from_pretrained("{FOLDER}", dtype="auto"{trust})'
    code = card.calls(reference.folder) or loads
    return f"```python\n{code}\n```" + (f"\n\ntransformers runs `{GROUP_NORM_CODE}` then." if brings_code else "")


def reload(reference: Reference, output: Path) -> Made:
    """Loads a folder as a user would, and lets it answer."""
    model = load(reference.kind, output, dtype="auto")
    kinds = next(model.parameters()).dtype

    def run(inputs: Batch) -> torch.Tensor:
        cast = {name: value.to(kinds) if value.is_floating_point() else value for name, value in inputs.items()}
        return answer(model, cast)

    return Made(run, usage(reference), sum(parameter.numel() for parameter in model.parameters()))


def bundle(folder: Path, spec: ExportSpec, reference: Reference, output: Path) -> Made:
    """The bundle itself: what the other forms are measured beside."""
    for name in ("config.json", WEIGHTS):
        shutil.copy(reference.folder / name, output / name)
    return reload(reference, output)


def _half(dtype: torch.dtype) -> Maker:
    def make(folder: Path, spec: ExportSpec, reference: Reference, output: Path) -> Made:
        model = load(reference.kind, reference.folder, code="model_invalid", dtype=dtype)
        model.save_pretrained(output, max_shard_size="100GB")
        return reload(reference, output)

    return make


FP16, BF16 = _half(torch.float16), _half(torch.bfloat16)
