"""What the import linter's layers cannot say: allow lists, and what a fresh process has loaded."""

from __future__ import annotations

import subprocess
import sys

import grimp
import pytest

TRAINING = {
    "torch", "transformers", "peft", "opacus", "safetensors", "sentencepiece", "tokenizers", "onnx", "onnxruntime",
}  # fmt: skip


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("app", "worker", include_external_packages=True, cache_dir=None)


def _imports(graph: grimp.ImportGraph, room: str) -> set[str]:
    """All that the modules of a room import directly from outside of it."""
    modules = {room} | graph.find_descendants(room)
    found = {up for module in modules for up in graph.find_modules_directly_imported_by(module)}
    return {name for name in found if name not in modules}


def _external(graph: grimp.ImportGraph, room: str) -> set[str]:
    ours = ("app", "worker")
    names = {name.partition(".")[0] for name in _imports(graph, room)}
    return {name for name in names if name not in ours and name not in sys.stdlib_module_names}


def test_privacy_is_arithmetic(graph: grimp.ImportGraph) -> None:
    assert {name for name in _imports(graph, "app.privacy") if name.startswith(("app", "worker"))} == set()
    assert _external(graph, "app.privacy") <= {"numpy", "scipy", "dp_accounting"}


def test_the_catalog_is_data(graph: grimp.ImportGraph) -> None:
    ours = {name for name in _imports(graph, "app.catalog") if name.startswith(("app", "worker"))}
    assert {".".join(name.split(".")[:2]) for name in ours} <= {"app.privacy"}
    assert _external(graph, "app.catalog") == set()


def test_the_trainer_shares_only_privacy_and_catalog_with_the_service(graph: grimp.ImportGraph) -> None:
    ours = {name for name in _imports(graph, "worker.trainer") if name.startswith("app")}
    assert {".".join(name.split(".")[:2]) for name in ours} <= {"app.privacy", "app.catalog"}
    shared = {name for name in _imports(graph, "worker.exporter") if name.startswith("app")}
    assert {".".join(name.split(".")[:2]) for name in shared} <= {"app.catalog"}
    assert {name for name in _imports(graph, "worker.trainer") if name.startswith("worker")} == set()


def test_opacus_is_imported_in_no_room_but_tests(graph: grimp.ImportGraph) -> None:
    assert "opacus" not in graph.modules


@pytest.mark.parametrize(
    "module", ["app.main", "app.cli", "worker.main", "worker.supervisor", "worker.trainer.spec", "worker.exporter.spec"]
)
def test_importing_it_leaves_what_trains_unloaded(module: str) -> None:
    program = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert TRAINING & loaded == set()
    if module.startswith("app."):
        assert "worker" not in loaded
