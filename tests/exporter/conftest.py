"""Bundles as jobs leave them, trained for real on a toy set, without noise so that their answers mean something."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from app.catalog.adaptations import Head
from app.catalog.recipes import HEAD_PHASE, MAIN_PHASE, Phase
from tests.trainer.conftest import _torch_switches  # noqa: F401
from tests.trainer.jobs import ADAPTATIONS, KEY, make_base, make_job, rows
from worker.exporter.run import run as export
from worker.exporter.spec import PUBLIC_FILE, ExportSpec, StudentSpec
from worker.trainer.control import Control
from worker.trainer.run import run as train


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT."""
    return make_base(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="session")
def bundle(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a LoRA job released."""
    torch.set_num_threads(1)
    head = Phase(HEAD_PHASE, Head(), 0.5, 30, 0.3, 0.3)
    main = Phase(MAIN_PHASE, ADAPTATIONS["lora"], 0.5, 20, 2e-2, 2e-2)
    made = make_job(tmp_path_factory.mktemp("job") / "job", base, private=False, evaluation="none", phases=(head, main))
    train(made.folder, KEY, Control(None))
    folder = made.folder / "results/model"
    (folder / "privacy_report.json").write_text('{"job": "ftjob-test"}')
    return folder


@pytest.fixture(scope="session")
def _graphs() -> dict[str, tuple[Path, dict[str, Any]]]:
    """ONNX exports of the bundle that this run has made: each takes seconds."""
    return {}


@pytest.fixture
def make(
    bundle: Path, base: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, _graphs: dict[str, Any]
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Makes one export of the bundle (or of `of`); its folder, the caller's own, and its metrics."""

    def run(
        format_: str,
        *,
        of: Path = bundle,
        texts: list[str] | None = None,
        sides: dict[str, list[str]] | None = None,
        **fields: Any,
    ) -> Any:
        if format_ in _graphs and of == bundle:
            folder, metrics = _graphs[format_]
            return shutil.copytree(folder, tmp_path / format_), metrics
        folder = tmp_path_factory.mktemp("export") / "folder"
        shutil.copytree(of, folder / "model")
        student = None
        sides = sides or ({} if texts is None else {"text": texts})
        if sides:
            told = {name: fields.pop(name) for name in ("source_prefix", "languages_of") if name in fields}
            layers, epochs = fields.pop("num_layers", None), fields.pop("n_epochs", 30)
            student = StudentSpec({role: f"my {role}" for role in sides}, layers, epochs, **told)
            (folder / "data").mkdir()
            pq.write_table(pa.table({f"my {role}": cells for role, cells in sides.items()}), folder / PUBLIC_FILE)
        spec = ExportSpec(
            "export-1", "ft-tiny-1", "ftjob-test", "tiny", format_, "0" * 64, str(base), 2, student, threads=1
        )
        dataclasses.replace(spec, **fields).write(folder)
        metrics = export(folder)
        made = folder / "results/export"
        if format_.startswith("onnx") and of == bundle:
            _graphs[format_] = made, metrics
            return shutil.copytree(made, tmp_path / format_), metrics
        return made, metrics

    return run


@pytest.fixture
def texts() -> list[str]:
    """Public rows of the same kind."""
    return [text for text, _ in rows(240)]
