"""Translators in a hub's layout, SentencePiece files and no tokenizer.json, from the folder to a bundle."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.catalog.recipes import MAIN_PHASE, Phase
from app.models.folder_reader import Refused
from app.models.model_folder import inspect
from tests.running import REPOSITORY
from tests.trainer.hub_folders import make_marian, make_mt5
from tests.trainer.jobs import ADAPTATIONS, KEY, make_job
from tests.trainer.seq2seq import translations
from worker.exporter.reference import Reference
from worker.trainer.control import Control
from worker.trainer.failure import TrainerFailure
from worker.trainer.families.registry import family_for
from worker.trainer.run import run
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.interface import load_tokenizer, without_token
from worker.trainer.tasks.text_to_text import Translation

TASK = TaskSpec("translation", {"source": "review", "target": "mood"}, (), 16, {"max_target_length": 12})
MAKERS = {"marian": make_marian, "marian-separate": partial(make_marian, separate=True), "mt5": make_mt5}

#: What a user of the bundle runs, with nothing of ours in reach.
LOADED = """
import json, sys, warnings
warnings.simplefilter("ignore")
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer, model = (kind.from_pretrained(sys.argv[1]) for kind in (AutoTokenizer, AutoModelForSeq2SeqLM))
asked = tokenizer(sys.argv[2:], return_tensors="pt", padding=True)
written = model.generate(**asked, max_new_tokens=12)
print(json.dumps([type(tokenizer).__name__, asked["input_ids"].tolist(), tokenizer.batch_decode(written)]))
"""


def laid_out(folder: Path, into: Path) -> Path:
    """What the worker gives a trainer of a folder."""
    found = inspect(folder, folder.parent, "mine")
    into.mkdir()
    for name, content in found.small.items():
        (into / name).write_bytes(content)
    for name, path in found.weights.items():
        (into / name).symlink_to(path)
    return into


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    return {family: make(root / family) for family, make in MAKERS.items()}


@pytest.fixture(scope="module")
def bases(hub: dict[str, Path]) -> dict[str, Path]:
    return {family: laid_out(folder, folder.with_name(f"{family}-base")) for family, folder in hub.items()}


def load_elsewhere(bundle: Path, *texts: str) -> Any:
    command = [sys.executable, "-I", "-c", LOADED, str(bundle), *texts]
    return json.loads(subprocess.run(command, capture_output=True, check=True, cwd=bundle, text=True).stdout)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_private_job_gives_a_bundle_that_plain_transformers_loads_elsewhere(
    tmp_path: Path, bases: dict[str, Path], kind: str
) -> None:
    phases = (Phase(MAIN_PHASE, ADAPTATIONS["full"], 0.5, 3, 1e-2, 1e-2),)
    family = kind.partition("-")[0]
    job = make_job(tmp_path / "job", bases[kind], family=family, task=TASK, phases=phases, data=translations(60))
    run(job.folder, KEY, Control(None))
    got = job.metrics()
    assert (got["released"], got["not_released"]["bleu"]) == ("private", "public_data_only")
    bundle = job.folder / "results/model"
    names = {path.name for path in bundle.iterdir()}
    own = {"source.spm", "target.spm", "vocab.json"} if family == "marian" else {"tokenizer.json"}
    assert ("target_vocab.json" in names) == (kind == "marian-separate")
    assert own | {"tokenizer_config.json", "generation_config.json"} <= names
    assert str(tmp_path) not in (bundle / "tokenizer_config.json").read_text()
    before, after = load_file(bases[kind] / "model.safetensors"), load_file(bundle / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    if kind == "marian-separate":  # each side's own, and the head's, which is the decoder's
        assert {f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder")} <= changed
        assert not {"model.shared.weight", "lm_head.weight"} & after.keys()
    tokenizer, asked, written = load_elsewhere(bundle, "the cat sleeps", "the dog")
    assert tokenizer == {"marian": "MarianTokenizer", "mt5": "T5Tokenizer"}[family]
    expected = load_tokenizer(bases[kind])(["the cat sleeps", "the dog"], padding=True)["input_ids"]
    assert asked == expected
    assert len(written) == 2
    again = inspect(bundle, bundle.parent, "again").base  # and it can be trained further
    assert (again.family, again.language_pair) == (family, ("en", "fr") if family == "marian" else ())


@pytest.mark.parametrize("kind", ["marian", "marian-separate"])
def test_on_public_data_it_learns_and_is_scored(tmp_path: Path, bases: dict[str, Path], kind: str) -> None:
    phases = (Phase(MAIN_PHASE, ADAPTATIONS["full"], 0.5, 120, 1e-2, 1e-2),)
    job = make_job(
        tmp_path / "job",
        bases[kind],
        family="marian",
        task=TASK,
        private=False,
        evaluation="public",
        phases=phases,
        data=translations(60),
    )
    run(job.folder, KEY, Control(None))
    got = job.metrics()
    assert got["token_accuracy"] > 0.8
    assert got["chrf"] > 60.0
    assert got["generated_rows"] == 12


def test_pieces_are_sentencepieces_own(bases: dict[str, Path], hub: dict[str, Path]) -> None:
    """Each side by its own file, ids by vocab.json or, if the target has one, its own."""
    import sentencepiece

    for kind in ("marian", "marian-separate"):
        tokenizer = load_tokenizer(bases[kind])
        for side, name, text in (
            ("text", "source.spm", "the cat sleeps"),
            ("text_target", "target.spm", "le chien court"),
        ):
            separate = kind == "marian-separate" and side == "text_target"
            ids = json.loads((hub[kind] / ("target_vocab.json" if separate else "vocab.json")).read_text())
            own = sentencepiece.SentencePieceProcessor(model_file=str(hub[kind] / name)).encode(text, out_type=str)
            assert tokenizer(**{side: [text]})["input_ids"][0] == [*(ids[piece] for piece in own), ids["</s>"]]
    model = sentencepiece.SentencePieceProcessor(model_file=str(hub["mt5"] / "spiece.model"))
    assert load_tokenizer(bases["mt5"])(["the cat sleeps"])["input_ids"][0] == [*model.encode("the cat sleeps"), 1]


def test_a_translator_for_several_languages_is_told_which(tmp_path: Path) -> None:
    hub = make_marian(tmp_path / "hub", languages=("fra", "ita"))
    base = inspect(hub, tmp_path, "mine").base
    assert (base.languages, base.language_pair) == (("fra", "ita"), ())
    spec = TaskSpec("translation", {}, (), 16, {"max_target_length": 8, "source_prefix": ">>ita<< "})
    examples = Translation(spec, laid_out(hub, tmp_path / "base"), 32).encode({"source": ["the cat"], "target": ["le"]})
    assert examples.sequences["input_ids"][0][0] == json.loads((hub / "vocab.json").read_text())[">>ita<<"]


def test_what_a_model_must_not_write_it_does_not_write(bases: dict[str, Path], tmp_path: Path) -> None:
    """Of Marian's models that is the padding: its logit was never trained, and nothing else keeps it down."""
    base = shutil.copytree(bases["marian"], tmp_path / "base")
    model = family_for("marian", "translation").load(base, TASK)
    padding = model.config.pad_token_id
    with torch.no_grad():
        model.final_logits_bias[0, padding] = 50.0
        model.final_logits_bias[0, 0] = -50.0  # nor does it end at once
    task = Translation(TASK, base, 32)
    examples = task.encode({"source": ["the cat"] * 3, "target": ["le chat"] * 3})
    assert task.public_metrics(model, examples)["chrf"] > 0.0


def test_what_has_no_token_is_not_written(bases: dict[str, Path], tmp_path: Path) -> None:
    """The smaller side's vocabulary leaves some of the weights out, which its tokenizer fails to decode."""
    base = shutil.copytree(bases["marian-separate"], tmp_path / "base")
    model = family_for("marian", "translation").load(base, TASK)
    left_out = without_token(load_tokenizer(base), model.config.decoder_vocab_size)
    assert left_out
    with torch.no_grad():
        model.final_logits_bias[0, left_out] = 50.0
    task = Translation(TASK, base, 32)
    examples = task.encode({"source": ["the cat"] * 3, "target": ["le chat"] * 3})
    assert "chrf" in task.public_metrics(model, examples)
    model.save_pretrained(base)
    assert Reference.load(base).logits.shape[-1] == model.config.decoder_vocab_size


def test_pickled_weights_are_refused_and_the_line_of_the_docs_makes_them_readable(tmp_path: Path) -> None:
    folder = make_marian(tmp_path / "hub", pickled=True)
    with pytest.raises(Refused, match=r"docs/generative\.md") as caught:
        inspect(folder, tmp_path, "mine")
    assert caught.value.code == "no_safetensors"
    docs = (REPOSITORY / "docs/generative.md").read_text()
    (line,) = re.findall(r"^    python -c '(.*)' FOLDER$", docs, re.MULTILINE)
    subprocess.run([sys.executable, "-c", line, str(folder)], capture_output=True, check=True, cwd=tmp_path)
    base = inspect(folder, tmp_path, "mine").base
    assert (base.language_pair, base.tasks[0]) == (("en", "fr"), "text_to_text")
    tokenizer = load_tokenizer(laid_out(folder, tmp_path / "base"))
    assert tokenizer(["the cat"])["input_ids"][0][-1] == 0


def test_a_file_that_the_scan_lets_through_and_the_library_does_not_is_a_failure_with_a_code(tmp_path: Path) -> None:
    base = laid_out(make_marian(tmp_path / "hub"), tmp_path / "base")
    (base / "source.spm").write_bytes(b"\x0a\x00")
    with pytest.raises(TrainerFailure) as caught:
        load_tokenizer(base)
    assert caught.value.code == "base_model_invalid"
