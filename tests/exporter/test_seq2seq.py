"""Exports of models that read with an encoder and write with a decoder: trained for real, run as their README says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoModelForSeq2SeqLM

from app.catalog.exports import EXPORT_FORMATS
from app.catalog.recipes import MAIN_PHASE, Phase
from tests.trainer.hub_folders import make_marian
from tests.trainer.jobs import ADAPTATIONS, KEY, make_job
from tests.trainer.seq2seq import make_seq2seq_base, translations
from worker.exporter.comparison import check
from worker.exporter.formats import onnx_graph
from worker.exporter.reference import Reference
from worker.exporter.spec import ExportFailure
from worker.trainer.control import Control
from worker.trainer.run import run as train
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.interface import load_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

Make = Callable[..., tuple[Path, dict[str, Any]]]

TASK = TaskSpec("translation", {"source": "review", "target": "mood"}, (), 24, {"max_target_length": 16})
UNSEEN = ["the cat runs", "the dog", "the cat sleeps"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What public jobs released: a T5 with a tokenizer.json, a Marian with SentencePiece files."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("seq2seq")
    made = {}
    for family, base in (("t5", make_seq2seq_base(root / "t5", "t5")), ("marian", make_marian(root / "marian"))):
        job = make_job(
            root / f"{family}-job",
            base,
            family=family,
            task=TASK,
            private=False,
            evaluation="none",
            phases=(Phase(MAIN_PHASE, ADAPTATIONS["full"], 0.5, 120, 1e-2, 1e-2),),
            data=translations(60),
        )
        train(job.folder, KEY, Control(None))
        made[family] = job.folder / "results/model"
        (made[family] / "privacy_report.json").write_text("{}")
    return made


def written_by(bundle: Path, texts: list[str]) -> list[str]:
    """Greedily, by plain transformers."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(bundle).eval(), load_tokenizer(bundle)
    asked = tokenizer(texts, padding=True, return_tensors="pt")
    written = model.generate(**asked, num_beams=1, do_sample=False, max_new_tokens=16)
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def as_its_readme_says(folder: Path, texts: list[str]) -> list[str]:
    """What the card's own code prints, in a process that has nothing of ours."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    code = code.replace("PATH_OF_THIS_FOLDER", str(folder)).replace('["…"], 128', f"{texts!r}, 16")
    command = [sys.executable, "-I", "-W", "ignore", "-c", code]
    ended = subprocess.run(command, capture_output=True, check=True, cwd=folder, text=True)
    return eval(ended.stdout.splitlines()[-1])


def test_onnx_is_two_graphs_that_write_what_the_model_writes(make: Make, bundles: dict[str, Path]) -> None:
    bundle = bundles["t5"]
    folder, metrics = make("onnx", of=bundle)
    assert {path.name for path in folder.glob("*.onnx")} == {"encoder_model.onnx", "decoder_model.onnx"}
    assert metrics["agreement"] == 1.0
    assert metrics["relative_difference"] < 1e-3
    assert metrics["weights_bytes"] == sum(path.stat().st_size for path in folder.glob("*.onnx"))
    assert as_its_readme_says(folder, UNSEEN) == written_by(bundle, UNSEEN)
    assert "chat" in written_by(bundle, UNSEEN)[0]

    sessions = [onnxruntime.InferenceSession(folder / f"{name}_model.onnx") for name in ("encoder", "decoder")]
    assert [{declared.name for declared in session.get_inputs()} for session in sessions] == [
        {"input_ids", "attention_mask"},
        {"input_ids", "encoder_hidden_states", "encoder_attention_mask"},
    ]
    reference, form = Reference.load(bundle), EXPORT_FORMATS["onnx"]
    check(reference, form, onnx_graph.reload(reference, folder, 1).answer)
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        damaged = shutil.copytree(folder, folder.with_name(name))
        _damage(damaged / name)
        with pytest.raises(ExportFailure) as caught:
            check(reference, form, onnx_graph.reload(reference, damaged, 1).answer)
        assert caught.value.code == "export_check_failed"


def test_int8_of_a_translator_with_sentencepiece_files(make: Make, bundles: dict[str, Path]) -> None:
    bundle = bundles["marian"]
    folder, metrics = make("onnx_int8", of=bundle)
    vocabulary = load_tokenizer(bundle).vocab_size
    assert _matrices(folder / "encoder_model.onnx") == []
    assert _matrices(folder / "decoder_model.onnx") == [(16, vocabulary)]  # the head stays
    assert metrics["relative_difference"] < EXPORT_FORMATS["onnx_int8"].max_relative_difference
    assert {"source.spm", "target.spm", "vocab.json"} <= {path.name for path in folder.iterdir()}
    expected, got = written_by(bundle, UNSEEN), as_its_readme_says(folder, UNSEEN)
    assert sum(ours == theirs for ours, theirs in zip(expected, got, strict=True)) >= 2


def _matrices(path: Path) -> list[tuple[int, ...]]:
    """Shapes of those in float32."""
    tensors = onnx.load(path).graph.initializer
    shapes = [tuple(tensor.dims) for tensor in tensors if tensor.data_type == onnx.TensorProto.FLOAT]
    return [shape for shape in shapes if len(shape) == 2 and min(shape) > 8]


def _damage(path: Path) -> None:
    """The largest matrix changes its signs."""
    graph = onnx.load(path)
    floats = [tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    largest = max(floats, key=lambda tensor: numpy_helper.to_array(tensor).size)
    largest.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(largest), largest.name))
    onnx.save(graph, path)
