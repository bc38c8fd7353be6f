"""Every format, made from a trained bundle, loaded by hand in its own runtime, and compared with the bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from app.catalog.exports import EXPORT_FORMATS
from tests.exporter.readme import as_its_readme_says
from worker.exporter.comparison import check
from worker.exporter.formats import adapter, onnx_graph, student, weights
from worker.exporter.reference import Reference, answer
from worker.exporter.spec import ExportFailure

# Of the libraries' own code, as they call each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

Make = Callable[..., tuple[Path, dict[str, Any]]]

UNSEEN = [
    "good film",
    "the plot was awful",
    "a fine film is a film",
    "poor",
    "great great plot the was",
    "is a film bad",
]


def answers(folder: Path, texts: list[str] = UNSEEN, model: Any = None) -> torch.Tensor:
    """Logits by plain transformers."""
    model = model or AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval()
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model(**batch).logits.float()


@pytest.mark.parametrize(("format_", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_loads_with_plain_transformers(make: Make, bundle: Path, format_: str, dtype: Any) -> None:
    folder, metrics = make(format_)
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {dtype}
    assert torch.allclose(answers(folder).softmax(1), answers(bundle).softmax(1), atol=0.06)
    assert 1.5 < metrics["compression"] < 2.1
    assert metrics["agreement"] >= 0.95
    assert 0.0 < metrics["relative_difference"] <= EXPORT_FORMATS[format_].max_relative_difference


def test_an_adapter_on_its_base_answers_as_the_merged_model(make: Make, bundle: Path, base: Path) -> None:
    folder, metrics = make("adapter")
    assert not (folder / "model.safetensors").exists()
    plain = AutoModelForSequenceClassification.from_pretrained(base, config=AutoConfig.from_pretrained(folder))
    adapted = PeftModel.from_pretrained(plain, folder).eval()
    merged = answers(bundle)
    assert torch.allclose(answers(folder, model=adapted), merged, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(answers(folder, model=adapted.get_base_model()), merged + 1.0)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, "tiny")
    assert len(config["target_modules"]) == metrics["adapted_matrices"] == 4  # query and value of two layers
    assert not [name for name in config["modules_to_save"] if ".layer.0." in name or ".layer.1." in name]
    with adapted.disable_adapter():
        assert not torch.allclose(answers(folder, model=adapted), merged, atol=1e-2)


def test_onnx_takes_any_number_of_rows_and_tokens(make: Make, bundle: Path) -> None:
    folder, metrics = make("onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for texts in (UNSEEN, UNSEEN[:1], ["good"], UNSEEN * 5):
        encoded = tokenizer(texts, padding=True, return_tensors="np")
        inputs = {entry.name: encoded[entry.name] for entry in session.get_inputs()}
        (logits,) = session.run(None, inputs)
        assert np.allclose(logits, answers(bundle, texts), rtol=1e-3, atol=1e-4)
    assert metrics["agreement"] == 1.0
    assert b"site-packages" not in (folder / "model.onnx").read_bytes(), "where this machine keeps its libraries"


def test_int8_is_smaller_and_agrees(make: Make, bundle: Path) -> None:
    folder, metrics = make("onnx_int8")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    kinds = {node.op_type for node in _graph(folder / "model.onnx").node}
    assert kinds & {"MatMulInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLinear"}
    encoded = AutoTokenizer.from_pretrained(folder)(UNSEEN, padding=True, return_tensors="np")
    (logits,) = session.run(None, {entry.name: encoded[entry.name] for entry in session.get_inputs()})
    assert (logits.argmax(1) == answers(bundle).argmax(1).numpy()).mean() >= 0.8
    assert metrics["agreement"] >= 0.85
    assert b"site-packages" not in (folder / "model.onnx").read_bytes()


def _graph(path: Path) -> Any:
    return onnx.load(path).graph


def test_a_student_has_fewer_layers_and_follows_the_model(make: Make, bundle: Path, texts: list[str]) -> None:
    folder, metrics = make("student", texts=texts)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == metrics["num_layers"] == 2 < metrics["model_num_layers"] == 3
    told = answers(folder).argmax(1) == answers(bundle).argmax(1)
    assert told.float().mean() >= 0.8
    assert metrics["compared_on"] == "held-out rows of the public file"
    said = as_its_readme_says(folder, [], **{"A text of yours.": UNSEEN[1]})[0]
    assert said["score"] == pytest.approx(float(answers(folder, UNSEEN[1:2]).softmax(1).max()), abs=1e-3)
    assert metrics["agreement"] >= 0.8
    assert metrics["public_rows"] + metrics["num_inputs"] == len(texts)
    assert metrics["relative_difference"] < 0.6


def test_a_student_of_labels_that_are_each_true_or_not(
    make: Make, bundle: Path, texts: list[str], tmp_path: Path
) -> None:
    other = tmp_path / "labels"
    shutil.copytree(bundle, other)
    config = json.loads((bundle / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    _, metrics = make("student", of=other, texts=texts)
    assert metrics["agreement"] >= 0.8
    assert metrics["relative_difference"] < 0.6


def test_each_export_says_what_it_is_and_what_it_cost(make: Make, bundle: Path) -> None:
    for format_ in ("safetensors", "fp16"):
        folder, metrics = make(format_)
        record = json.loads((folder / "export.json").read_text())
        assert record["metrics"] == metrics
        assert record["privacy"]["epsilon"] == 0.0
        assert (record["format"], record["job"], record["made_from"]["sha256"]) == (format_, "ftjob-test", "0" * 64)
        assert (folder / "privacy_report.json").read_bytes() == (bundle / "privacy_report.json").read_bytes()
        assert "no further epsilon" in (folder / "README.md").read_text()
        assert metrics["speedup"] > 0.0
        assert metrics["num_inputs"] == 128


@pytest.mark.parametrize("format_", ["safetensors", "fp16", "bf16", "adapter", "onnx"])
def test_each_exports_readme_has_a_call_that_runs_as_printed(
    make: Make, bundle: Path, base: Path, format_: str
) -> None:
    folder, _ = make(format_)
    expected = answers(bundle, UNSEEN[1:2])
    places = {"A text of yours.": UNSEEN[1], **({"PATH_OF_TINY": str(base)} if format_ == "adapter" else {})}
    told = as_its_readme_says(folder, [], **places)
    if format_ == "onnx":
        assert np.allclose(told, expected, rtol=1e-3, atol=1e-3)
    else:
        config = AutoConfig.from_pretrained(bundle)
        assert told[0]["label"] == config.id2label[int(expected.argmax())]
        assert told[0]["score"] == pytest.approx(float(expected.softmax(1).max()), abs=0.02)
    assert 'Classes: "negative", "positive".' in (folder / "README.md").read_text()


@pytest.mark.parametrize("format_", ["fp16", "adapter", "onnx", "onnx_int8"])
def test_a_weight_that_is_damaged_on_the_way_is_found(make: Make, bundle: Path, base: Path, format_: str) -> None:
    """What was written is changed, and loaded as the exporter loads it: each format's check must see it."""
    made, _ = make(format_)
    reference = Reference.load(bundle)
    form = EXPORT_FORMATS[format_]

    def reloaded() -> Any:
        if format_ == "fp16":
            return weights.reload(reference, made).answer
        if format_ == "adapter":
            model = adapter.reload(reference, base, made)
            return lambda inputs: answer(model, inputs)
        return onnx_graph.reload(reference, made, 1).answer

    check(reference, form, reloaded())
    _damage(made)
    with pytest.raises(ExportFailure) as caught:
        check(reference, form, reloaded())
    assert caught.value.code == "export_check_failed"


def _damage(folder: Path) -> None:
    """The head's weights change their signs."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        (head,) = [name for name in tensors if "classifier" in name and name.endswith("weight")]
        save_file({**tensors, head: -tensors[head]}, path, metadata={"format": "pt"})
    for path in folder.glob("*.onnx"):
        graph = onnx.load(path)
        for tensor in graph.graph.initializer:
            if "classifier" in tensor.name and tensor.data_type == onnx.TensorProto.FLOAT:
                value = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(-value - 1.0 * (value.ndim == 0), tensor.name))
        onnx.save(graph, path)


def test_a_public_file_without_enough_text_makes_no_student(make: Make) -> None:
    with pytest.raises(ExportFailure) as caught:
        make("student", texts=["good"] * 20)
    assert caught.value.code == "data_mismatch"


def test_a_student_that_learnt_nothing_is_refused(
    make: Make, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(reference: Any, model: Any, *arguments: Any) -> None:
        model.classifier.weight.data.zero_()
        model.classifier.bias.data.copy_(torch.tensor([0.0, 5.0]))

    monkeypatch.setattr(student, "distil", forgets)
    with pytest.raises(ExportFailure) as caught:
        make("student", texts=texts)
    assert caught.value.code == "student_check_failed"


def test_a_model_that_changed_everywhere_has_no_adapter(make: Make, bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    tensors = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    moved = {name: value + 0.01 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
    save_file(moved, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportFailure) as caught:
        make("adapter", of=other)
    assert caught.value.code == "adapter_not_exact"
