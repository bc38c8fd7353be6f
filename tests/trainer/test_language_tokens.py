"""Translators whose texts begin with their language's token, in a hub's layout: from the folder to a bundle."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.catalog.recipes import MAIN_PHASE, Phase
from app.models.model_folder import inspect
from tests.trainer.hub_folders import make_m2m, make_mbart, make_mbart_25, make_nllb
from tests.trainer.jobs import ADAPTATIONS, KEY, as_its_card_says, make_job
from tests.trainer.seq2seq import translations
from tests.trainer.test_hub_folders import laid_out
from worker.exporter.reference import Reference
from worker.trainer.control import Control
from worker.trainer.failure import TrainerFailure
from worker.trainer.families.registry import family_for
from worker.trainer.run import run
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.interface import IGNORED
from worker.trainer.tasks.text_to_text import Translation

MAKERS = {"mbart": make_mbart, "mbart-25": make_mbart_25, "m2m_100": make_m2m, "nllb": make_nllb}
CODES = {
    "mbart": ("en_XX", "fr_XX", "de_DE"),
    "mbart-25": ("en_XX", "fr_XX", "de_DE"),
    "m2m_100": ("en", "fr", "de"),
    "nllb": ("eng_Latn", "fra_Latn", "deu_Latn"),
}
COLUMNS = {"source": "review", "target": "mood"}

#: What a user of the bundle runs, with nothing of ours in reach, and nobody saying a language.
LOADED = """
import json, sys, warnings
warnings.simplefilter("ignore")
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer, model = (kind.from_pretrained(sys.argv[1]) for kind in (AutoTokenizer, AutoModelForSeq2SeqLM))
asked = tokenizer(sys.argv[2:], return_tensors="pt", padding=True)
written = model.generate(**asked, max_new_tokens=12, num_beams=1)
texts = tokenizer.batch_decode(written, skip_special_tokens=True)
print(json.dumps([asked["input_ids"].tolist(), written.tolist(), texts, tokenizer.convert_ids_to_tokens(written[0])]))
"""


def family_of(kind: str) -> str:
    return "m2m_100" if kind == "nllb" else kind.removesuffix("-25")


def setting_of(kind: str) -> str:
    """Of generating, which holds the token of the language to write."""
    return "decoder_start_token_id" if kind == "mbart-25" else "forced_bos_token_id"


def spec(kind: str, **options: Any) -> TaskSpec:
    source, target, _ = CODES[kind]
    said = options or {"source_lang": source, "target_lang": target}
    return TaskSpec("translation", COLUMNS, (), 16, {"max_target_length": 12, **said})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    return {kind: laid_out(make(root / kind), root / f"{kind}-base") for kind, make in MAKERS.items()}


def _save(model: Any, task: Translation, folder: Path) -> None:
    """As much of a bundle as its card's code needs."""
    model.save_pretrained(folder)
    task.processor.save_pretrained(folder)
    (folder / "README.md").write_text(f"```python\n{task.usage()}\n```\n")


def load_elsewhere(bundle: Path, *texts: str) -> Any:
    command = [sys.executable, "-I", "-c", LOADED, str(bundle), *texts]
    return json.loads(subprocess.run(command, capture_output=True, check=True, cwd=bundle, text=True).stdout)


@pytest.mark.parametrize("kind", ["mbart", "mbart-25", "m2m_100"])
def test_a_private_job_gives_a_bundle_that_writes_the_language_it_was_trained_for(
    tmp_path: Path, bases: dict[str, Path], kind: str
) -> None:
    adaptation = "lora" if kind == "m2m_100" else "full"
    phases = (Phase(MAIN_PHASE, ADAPTATIONS[adaptation], 0.5, 3, 1e-2, 1e-2),)
    family = family_of(kind)
    job = make_job(tmp_path / "job", bases[kind], family=family, task=spec(kind), phases=phases, data=translations(60))
    dataclasses.replace(job.spec, published_steps=(2,)).write(job.folder)
    run(job.folder, KEY, Control(None))
    assert job.metrics()["released"] == "private"
    bundle = job.folder / "results/model"
    assert str(tmp_path) not in (bundle / "tokenizer_config.json").read_text()
    before, after = load_file(bases[kind] / "model.safetensors"), load_file(bundle / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert ("model.shared.weight" in changed) == (adaptation == "full")
    if adaptation == "lora":
        assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)
    asked, written, _, tokens = load_elsewhere(bundle, "the cat sleeps", "the dog")
    task = Translation(spec(kind), bases[kind], 32)
    examples = task.encode({"source": ["the cat sleeps"], "target": ["le chat dort"]})
    assert asked[0] == examples.sequences["input_ids"][0].tolist()
    first = int(examples.sequences["labels"][0][-1 if kind == "mbart-25" else 0])
    for made in (bundle, job.folder / "taken/2/results/model"):
        assert json.loads((made / "generation_config.json").read_text())[setting_of(kind)] == first
    begins = [first] if kind == "mbart-25" else [2, first]  # </s>, then the language's token
    assert [row[: len(begins)] for row in written] == [begins] * 2
    assert tokens[len(begins) - 1] == {"m2m_100": "__fr__"}.get(kind, "fr_XX")
    assert " ".join(CODES[kind][:2]).replace(" ", " into ") in (bundle / "README.md").read_text()
    again = inspect(bundle, bundle.parent, "again").base  # and it can be trained further
    assert (again.family, set(CODES[kind]) <= {*again.languages}) == (family, True)
    # What its exports are compared on is read, and begun, alike.
    inputs = Reference.load(bundle).inputs
    for place, token in enumerate(begins):
        assert {*inputs["decoder_input_ids"][:, place].tolist()} == {token}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_records_loss_is_transformers_own(bases: dict[str, Path], kind: str) -> None:
    """One record at a time, without padding, against the library's mean over its labels; both begin as it says."""
    source = CODES[kind][0]
    model = family_for(family_of(kind), "translation").load(bases[kind], spec(kind))
    task = Translation(spec(kind), bases[kind], 32)
    pairs = [*translations(4), ("", "le")]
    examples = task.encode({"source": [source for source, _ in pairs], "target": [target for _, target in pairs]})
    batch = task.batch(examples, range(5), torch.device("cpu"))
    assert int((batch["labels"] == IGNORED).sum()) > 0
    losses = task.loss(task.outputs(model, batch), batch)
    for row in range(5):
        ids, labels = (torch.from_numpy(examples.sequences[name][row])[None] for name in ("input_ids", "labels"))
        torch.testing.assert_close(losses[row], model(input_ids=ids, labels=labels).loss)
    places = [-1, -2] if kind == "mbart-25" else [0, -1]
    ends = {tuple(examples.sequences["input_ids"][row][places].tolist()) for row in range(5)}
    mark = {"m2m_100": "__{}__"}.get(kind, "{}").format(source)
    assert ends == {(task.processor.convert_tokens_to_ids(mark), 2)}


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_with_languages_of_their_own_say_them_and_are_answered_in_them(
    tmp_path: Path, bases: dict[str, Path], kind: str
) -> None:
    source, first, second = CODES[kind]
    told = spec(kind, languages_of=family_of(kind))
    model = family_for(family_of(kind), "translation").load(bases[kind], told)
    task = Translation(told, bases[kind], 32)
    task.prepare(model)
    assert getattr(model.generation_config, setting_of(kind)) is None
    columns = {"source": ["the cat", "the dog", "the cat"], "target": ["le chat"] * 3, "source_lang": [source] * 3}
    examples = task.encode({**columns, "target_lang": [first, second, first]})
    for row, target in enumerate((first, second, first)):
        alone = Translation(spec(kind, source_lang=source, target_lang=target), bases[kind], 32)
        one = alone.encode({"source": [columns["source"][row]], "target": ["le chat"]})
        for name in ("input_ids", "labels"):
            assert examples.sequences[name][row].tolist() == one.sequences[name][0].tolist()
        alone.prepare(model)
        assert task._write(model, examples, [row]) == alone._write(model, one, [0])
    assert len(task._write(model, examples, [2, 1, 0])) == 3
    _save(model, task, tmp_path)
    called = as_its_card_says(tmp_path, SOURCE_LANG=source, TARGET_LANG=first)
    greedily = {"do_sample": False, "num_beams": 1}
    for row, target in enumerate((first, second, first)):
        said = called(columns["source"][row], source, target, **greedily)
        assert said == task._write(model, examples, [row])[0]
    assert any(setting_of(kind) in note for note in task.notes())
    with pytest.raises(TrainerFailure) as caught:
        task.encode({**columns, "target_lang": [first, "klingon", first]})
    assert caught.value.code == "data_mismatch"


def test_a_tokenizer_with_more_tokens_than_the_weights_is_a_failure_with_a_code(bases: dict[str, Path]) -> None:
    """Languages that tokenizer.json lacks are added to it, with ids that no weight has."""
    model = family_for("m2m_100", "translation").load(bases["nllb"], spec("nllb"))
    task = Translation(spec("nllb"), bases["nllb"], 32)
    task.processor.add_tokens(["ace_Arab", "ace_Latn", "acm_Arab"])
    with pytest.raises(TrainerFailure) as caught:
        task.prepare(model)
    assert caught.value.code == "base_model_invalid"
