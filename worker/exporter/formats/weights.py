"""Exports that plain transformers loads: the bundle as it is, and its weights in half precision."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from app.catalog.families import GROUP_NORM_CODE
from worker.exporter.architectures import load
from worker.exporter.formats.maker import Made, Maker
from worker.exporter.reference import Batch, Reference, answer
from worker.exporter.spec import ExportSpec

WEIGHTS = "model.safetensors"


def usage(reference: Reference) -> str:
    """Two lines of Python."""
    loader = reference.kind.loader.__name__
    brings_code = (reference.folder / GROUP_NORM_CODE).exists()
    trust = f", trust_remote_code=True)  # it runs {GROUP_NORM_CODE}" if brings_code else ")"
    return (
        f'```python\nfrom transformers import {loader}\n\nmodel = {loader}.from_pretrained("PATH_OF_THIS_FOLDER", '
        f'dtype="auto"{trust}\n```'
    )


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
