"""Exports of models that read with an encoder and write with a decoder: trained for real, run as their README says."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
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
from tests.exporter.readme import as_its_readme_says
from tests.trainer.hub_folders import make_m2m, make_marian, make_mbart_25
from tests.trainer.jobs import ADAPTATIONS, KEY, make_job
from tests.trainer.seq2seq import FAMILIES, make_seq2seq_base, translations
from worker.exporter.card import prefix
from worker.exporter.comparison import check
from worker.exporter.formats import onnx_graph, seq2seq_graphs, student
from worker.exporter.reference import Reference, answer
from worker.exporter.spec import ExportFailure
from worker.trainer.control import Control
from worker.trainer.run import run as train
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.interface import load_tokenizer
from worker.trainer.tasks.text_to_text import TextToText

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

Make = Callable[..., tuple[Path, dict[str, Any]]]

TASK = TaskSpec("translation", {"source": "review", "target": "mood"}, (), 24, {"max_target_length": 16})
SIDES = {"source": [read for read, _ in translations(240)], "target": [said for _, said in translations(240)]}
GRAPHS = ("encoder", "decoder", "decoder_with_past")
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


def test_onnx_is_three_graphs_that_write_what_the_model_writes(make: Make, bundles: dict[str, Path]) -> None:
    bundle = bundles["t5"]
    folder, metrics = make("onnx", of=bundle)
    assert {path.name for path in folder.glob("*.onnx")} == {f"{name}_model.onnx" for name in GRAPHS}
    assert metrics["agreement"] == 1.0
    assert metrics["relative_difference"] < 1e-3
    files = {path.name: path.stat().st_size for path in folder.glob("*.onnx*")}
    assert metrics["weights_bytes"] == sum(files.values())
    assert files.keys() - {f"{name}_model.onnx" for name in GRAPHS} == {"decoder_model.onnx.data"}
    once = {each.tobytes() for name in GRAPHS[1:] for each in _weights(folder / f"{name}_model.onnx")}
    assert len(once) > 10
    assert sum(map(len, once)) <= files["decoder_model.onnx.data"] < sum(map(len, once)) + 4096 * len(once)
    assert as_its_readme_says(folder, UNSEEN) == written_by(bundle, UNSEEN)
    assert "chat" in written_by(bundle, UNSEEN)[0]

    sessions = [onnxruntime.InferenceSession(folder / f"{name}_model.onnx") for name in GRAPHS]
    kept = [
        f"{layer}.{part}"
        for layer in range(2)
        for part in ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
    ]
    assert [{declared.name for declared in session.get_inputs()} for session in sessions] == [
        {"input_ids", "attention_mask"},
        {"input_ids", "encoder_hidden_states", "encoder_attention_mask"},
        {"input_ids", "encoder_attention_mask", *(f"past_key_values.{each}" for each in kept)},
    ]
    given = [[answer.name for answer in session.get_outputs()] for session in sessions[1:]]
    assert given[0] == ["logits", *(f"present.{each}" for each in kept)]
    assert given[1] == ["logits", *(f"present.{each}" for each in kept if ".decoder." in each)]
    reference, form = Reference.load(bundle), EXPORT_FORMATS["onnx"]
    check(reference, form, onnx_graph.reload(reference, folder, 1).answer)
    for name in (f"{name}_model.onnx" for name in GRAPHS):
        damaged = shutil.copytree(folder, folder.with_name(name))
        _damage(damaged / name)
        with pytest.raises(ExportFailure) as caught:
            check(reference, form, onnx_graph.reload(reference, damaged, 1).answer)
        assert caught.value.code == "export_check_failed"


def test_int8_of_a_translator_with_sentencepiece_files(make: Make, bundles: dict[str, Path]) -> None:
    bundle = bundles["marian"]
    folder, metrics = make("onnx_int8", of=bundle)
    assert _matrices(folder / "encoder_model.onnx") == []
    for name in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
        assert _matrices(folder / name) == []
        taken = {each: node for node in onnx.load(folder / name).graph.node for each in node.output}
        head = taken[next(each for each in taken["logits"].input if each in taken)]
        assert head.op_type == "MatMul"  # computed in float32
    assert metrics["relative_difference"] < EXPORT_FORMATS["onnx_int8"].max_relative_difference
    assert {"source.spm", "target.spm", "vocab.json"} <= {path.name for path in folder.iterdir()}
    expected, got = written_by(bundle, UNSEEN), as_its_readme_says(folder, UNSEEN)
    assert sum(ours == theirs for ours, theirs in zip(expected, got, strict=True)) >= 2


@pytest.mark.parametrize(("of", "source", "target"), [(make_m2m, "en", "fr"), (make_mbart_25, "en_XX", "fr_XX")])
def test_graphs_of_a_translator_for_many_languages_write_the_one_that_it_was_trained_for(
    make: Make, tmp_path: Path, of: Callable[[Path], Path], source: str, target: str
) -> None:
    """What a job's bundle has: languages in the tokenizer's configuration, and the token that is forced, or begins."""
    base, bundle = of(tmp_path / "base"), tmp_path / "bundle"
    said = {"source_lang": source, "target_lang": target, "max_target_length": 16}
    task = TextToText(TaskSpec("translation", {}, (), 24, said), base, 24)
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    task.prepare(model)
    model.generation_config.forced_eos_token_id = None  # with which a text ends that is cut; these may not end at all
    with torch.no_grad():
        model.model.shared.weight.mul_(20.0)
        model.model.decoder.layer_norm.weight.normal_()  # so that it does not write what it reads, over and over
    for part in (task.processor, model):
        part.save_pretrained(bundle)
    (bundle / "privacy_report.json").write_text("{}")
    folder, metrics = make("onnx", of=bundle)
    assert metrics["agreement"] == 1.0
    forced = model.generation_config.forced_bos_token_id
    assert (f", {forced}), 1)" in (folder / "README.md").read_text()) == (forced is not None) == (of is make_m2m)
    assert as_its_readme_says(folder, UNSEEN) == written_by(bundle, UNSEEN)
    assert all(written_by(bundle, UNSEEN))


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_a_student_learns_what_the_model_writes(make: Make, bundles: dict[str, Path], family: str) -> None:
    folder, metrics = make("student", of=bundles[family], sides=SIDES, num_layers=1, n_epochs=30)
    assert (metrics["num_layers"], metrics["model_num_layers"]) == (1, 2)
    assert metrics["compared_on"] == "held-out rows of the public file"
    assert metrics["relative_difference"] < 0.6
    assert metrics["agreement"] > 0.8
    config = json.loads((folder / "config.json").read_text())
    depths = ("num_layers", "num_decoder_layers") if family == "t5" else ("encoder_layers", "decoder_layers")
    assert [config[name] for name in depths] == [1, 1]
    assert written_by(folder, ["the cat runs"])[0].startswith("le ")
    code = (folder / "README.md").read_text().replace("print(run(", "print(repr([run(").replace("))\n```", ")]))\n```")
    (folder / "README.md").write_text(code)
    assert as_its_readme_says(folder, [], **{"A text of yours.": "the cat runs"})[0].startswith("le ")
    searching = [json.loads((of / "generation_config.json").read_text()) for of in (folder, bundles[family])]
    assert searching[0].get("bad_words_ids") == searching[1].get("bad_words_ids")
    assert ("bad_words_ids" in searching[0]) == (family == "marian")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_begins_as_layers_of_the_model(tmp_path: Path, family: str) -> None:
    """Each stack's last; a head of its own stays one, and what T5's first blocks hold for all."""
    folder = make_seq2seq_base(tmp_path / family, family)
    reference = Reference.load(folder)
    begun = student.drop_layers(reference.model, 1)
    ours, theirs = reference.model.state_dict(), begun.state_dict()
    blocks = [name for name in theirs if re.search(r"\.(layers|block)\.\d", name)]
    assert {re.search(r"(encoder|decoder)\.(?:layers|block)\.(\d)", name).groups() for name in blocks} == {
        ("encoder", "0"),
        ("decoder", "0"),
    }
    for name, value in theirs.items():
        shared = name.endswith("relative_attention_bias.weight")
        of = re.sub(r"(layers|block)\.0", r"\1.1", name, count=1) if name in blocks and not shared else name
        assert torch.equal(value, ours[of]), name
    begun.save_pretrained(tmp_path / "student")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student").eval()
    assert torch.allclose(answer(again, reference.inputs), answer(begun, reference.inputs), atol=1e-5)
    with pytest.raises(ExportFailure) as caught:
        student.drop_layers(reference.model, 2)
    assert caught.value.code == "student_not_smaller"


LANGUAGES = {"source_lang": ["en"] * 60, "target_lang": ["fr"] * 60}


@pytest.mark.parametrize(
    ("told", "more", "first"),
    [
        ({"source_prefix": "say "}, {}, "say the cat"),
        ({"languages_of": "t5"}, LANGUAGES, "translate English to French: the cat"),
        ({}, {}, "the cat"),
    ],
    ids=["prefix", "languages", "nothing"],
)
def test_a_student_reads_what_the_model_was_trained_to_read(
    make: Make,
    bundles: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    told: dict[str, str],
    more: dict[str, list[str]],
    first: str,
) -> None:
    seen: list[list[list[str]]] = []
    monkeypatch.setattr(student, "distil", lambda reference, model, texts, epochs: seen.append(texts))
    with contextlib.suppress(ExportFailure):  # it has learnt nothing
        sides = {"source": ["the cat"] * 60, "target": ["le chat"] * 60, **more}
        make("student", of=bundles["t5"], sides=sides, **told)
    assert [{*side} for side in seen[0]] == [{first}, {"le chat"}]


def _matrices(path: Path) -> list[tuple[int, ...]]:
    """Shapes of those in float32."""
    tensors = onnx.load(path).graph.initializer
    shapes = [tuple(tensor.dims) for tensor in tensors if tensor.data_type == onnx.TensorProto.FLOAT]
    return [shape for shape in shapes if len(shape) == 2 and min(shape) > 8]


def _weights(path: Path) -> list[Any]:
    """Those of a kibibyte or more, wherever they lie."""
    tensors = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    return [tensor for tensor in tensors if tensor.nbytes >= 1024]


def _damage(path: Path) -> None:
    """The largest matrix changes its signs."""
    graph = onnx.load(path)
    floats = [tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    largest = max(floats, key=lambda tensor: numpy_helper.to_array(tensor).size)
    largest.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(largest), largest.name))
    onnx.save(graph, path)


def test_an_adapters_readme_and_a_prefix_that_sources_begin_with(
    make: Make, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """Both as printed: on the base, with the words before the source; of graphs, the same words."""
    base = bundles["t5"]
    merged = shutil.copytree(base, tmp_path / "merged")
    changed = AutoModelForSeq2SeqLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in changed.named_parameters():
            if name.endswith("SelfAttention.q.weight"):
                left, right = (torch.randn(size, 2, generator=generator) for size in value.shape)
                value += 0.5 * left @ right.T
    changed.save_pretrained(merged)
    card = (base / "README.md").read_text()
    (merged / "README.md").write_text(card.replace("tokenizer(source,", 'tokenizer("the \\"cat " + source,'))
    folder, _ = make("adapter", of=merged, base_path=str(base))
    code = (folder / "README.md").read_text().replace("print(run(", "print(repr([run(").replace("))\n```", ")]))\n```")
    (folder / "README.md").write_text(code)
    places = {"A text of yours.": "runs", "PATH_OF_TINY": str(base)}
    assert as_its_readme_says(folder, [], **places) == written_by(merged, ['the "cat runs'])
    usage = seq2seq_graphs.usage(changed, prefix(merged))
    assert 'texts = ["the \\"cat " + text for text in texts]\n' in usage
