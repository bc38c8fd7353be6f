"""Text to text from a job folder to a bundle, for every encoder-decoder family; its loss against transformers' own."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from app.catalog.recipes import MAIN_PHASE, Phase
from app.models.model_folder import inspect
from tests.trainer.jobs import ADAPTATIONS, KEY, as_its_card_says, make_job
from tests.trainer.seq2seq import FAMILIES, WORDS, make_seq2seq_base, translations
from worker.trainer.control import Control
from worker.trainer.families.registry import family_for
from worker.trainer.run import run
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks import generated_text
from worker.trainer.tasks.interface import IGNORED
from worker.trainer.tasks.text_to_text import TextToText, Translation

TASK = TaskSpec("translation", {"source": "review", "target": "mood"}, (), 16, {"max_target_length": 8})
PREFIXED = TaskSpec("text_to_text", {}, (), 4, {"max_target_length": 3, "source_prefix": "say "})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("seq2seq")
    return {family: make_seq2seq_base(root / family, family) for family in FAMILIES}


@pytest.mark.parametrize("from_hub", [True, False])
def test_t5_1_1_keeps_outputs_that_nothing_scales(tmp_path: Path, bases: dict[str, Path], from_hub: bool) -> None:
    """flan-t5 says so by an untied head; what transformers saves of it, by a key of its own."""
    folder = tmp_path / "models" / "mine"
    shutil.copytree(bases["t5"], folder)
    config = json.loads((folder / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    head = torch.randn(len(WORDS), 16, generator=torch.Generator().manual_seed(3))
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    if not from_hub:
        AutoModelForSeq2SeqLM.from_pretrained(folder).save_pretrained(folder)
        assert "scale_decoder_outputs" in (folder / "config.json").read_text()
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in inspect(folder, folder.parent, "mine").small.items():
        (copy / name).write_bytes(content)
    (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
    model = family_for("t5", TASK.type).load(copy, TASK)
    vectors = []
    model.get_submodule("decoder.final_layer_norm").register_forward_hook(
        lambda module, inputs, output: vectors.append(output)
    )
    logits = model(input_ids=torch.tensor([[3, 4, 1]]), decoder_input_ids=torch.tensor([[0, 8]])).logits
    torch.testing.assert_close(logits, vectors[0] @ head.T)


def _phases(adaptation: str, steps: int, rate: float) -> tuple[Phase, ...]:
    return (Phase(MAIN_PHASE, ADAPTATIONS[adaptation], 0.5, steps, rate, rate),)


@pytest.mark.parametrize(
    ("family", "adaptation"),
    [
        *((family, adaptation) for family in FAMILIES for adaptation in ("full", "lora")),
        ("t5", "last_layers"),
        ("marian", "last_layers"),
        ("bart", "bitfit"),
        ("marian", "bitfit"),
    ],
)
def test_a_private_job_gives_a_bundle_that_plain_transformers_loads(
    tmp_path: Path, bases: dict[str, Path], family: str, adaptation: str
) -> None:
    job = make_job(
        tmp_path / "job",
        bases[family],
        family=family,
        task=TASK,
        phases=_phases(adaptation, 3, 1e-2),
        data=translations(60),
    )
    run(job.folder, KEY, Control(None))
    got = job.metrics()
    assert (got["released"], got["not_released"]["bleu"]) == ("private", "public_data_only")
    assert "generated_rows" not in got
    bundle = job.folder / "results/model"
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(bundle), AutoTokenizer.from_pretrained(bundle)
    answer = model.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=3, min_new_tokens=3)
    assert answer.shape == (1, 4)
    assert len(as_its_card_says(bundle)("the cat " * 40, min_new_tokens=3).split()) <= 16  # BART's has 32 positions
    assert (bundle / "generation_config.json").is_file()
    before, after = load_file(bases[family] / "model.safetensors"), load_file(bundle / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert ("lm_head.weight" in changed) == (family == "mt5" and adaptation == "full")  # the others' is tied
    assert "final_logits_bias" not in changed
    assert not any("embed_positions" in name for name in changed) or family == "bart"
    assert any("shared" in name or "embed_tokens" in name for name in changed) == (adaptation == "full")
    assert all(name.endswith(".bias") for name in changed) == (adaptation == "bitfit")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_records_loss_is_transformers_own(bases: dict[str, Path], family: str) -> None:
    """One record at a time, without padding, against the library's mean over its labels."""
    model = family_for(family, "translation").load(bases[family], TASK)
    task = TextToText(TASK, bases[family], 32)
    pairs = [*translations(4), ("", "le"), ("the cat the dog", "")]
    examples = task.encode({"source": [source for source, _ in pairs], "target": [target for _, target in pairs]})
    batch = task.batch(examples, range(6), torch.device("cpu"))
    assert int((batch["labels"] == IGNORED).sum()) > 0
    losses = task.loss(task.outputs(model, batch), batch)
    for row in range(6):
        ids, labels = (torch.from_numpy(examples.sequences[name][row])[None] for name in ("input_ids", "labels"))
        torch.testing.assert_close(losses[row], model(input_ids=ids, labels=labels).loss)
    assert examples.lengths.tolist() == [
        len(ids) + len(labels)
        for ids, labels in zip(examples.sequences["input_ids"], examples.sequences["labels"], strict=True)
    ]


def test_a_prefix_is_read_and_both_sides_keep_their_end(bases: dict[str, Path]) -> None:
    task = TextToText(PREFIXED, bases["t5"], 32)
    examples = task.encode({"source": ["the cat sleeps"], "target": ["le chat dort"]})
    said = [[WORDS[token] for token in examples.sequences[name][0]] for name in ("input_ids", "labels")]
    assert said == [["say", "the", "cat", "</s>"], ["le", "chat", "</s>"]]
    assert any("'say '" in note for note in task.notes())
    assert 'tokenizer("say " + source,' in task.usage()


def test_rows_with_languages_of_their_own_say_them(bases: dict[str, Path]) -> None:
    spec = TaskSpec("translation", {}, (), 16, {"max_target_length": 3, "languages_of": "marian"})
    columns = {"source": ["cat", "dog"], "target": ["le", "le"], "source_lang": ["en", "en"]}
    plain = Translation(TaskSpec("translation", {}, (), 16, {"max_target_length": 3}), bases["marian"], 32)
    told = Translation(spec, bases["marian"], 32)
    examples = told.encode({**columns, "target_lang": ["fra", "deu"]})
    expected = plain.encode({**columns, "source": [">>fra<< cat", ">>deu<< dog"]})
    for row in range(2):
        assert examples.sequences["input_ids"][row].tolist() == expected.sequences["input_ids"][row].tolist()
    assert any("'>>{target_lang}<< '" in note for note in told.notes())


@pytest.mark.parametrize(
    ("family", "places", "said"),
    [
        ("t5", {"SOURCE_LANG": "German", "TARGET_LANG": "Dutch"}, "translate German to Dutch: the cat"),
        ("marian", {"TARGET_LANG": "nld"}, ">>nld<< the cat"),
    ],
)
def test_where_rows_have_languages_the_card_asks_for_them(
    tmp_path: Path, bases: dict[str, Path], family: str, places: dict[str, str], said: str
) -> None:
    """None of its own: the reader's. What `run` reads is what a row of these languages was to the training."""
    columns = {"source": "review", "target": "mood", "source_lang": "from", "target_lang": "into"}
    task = TaskSpec("translation", columns, (), 16, {"max_target_length": 8, "languages_of": family})
    data, phases = translations(60), _phases("full", 1, 1e-2)
    job = make_job(tmp_path / "job", bases[family], family=family, task=task, phases=phases, data=data)
    sources, targets = zip(*data, strict=True)
    codes = {"from": ["de"] * 60, "into": ["fr" if family == "t5" else "fra"] * 60}
    pq.write_table(pa.table({"review": sources, "mood": targets, **codes}), job.folder / "data/training.parquet")
    run(job.folder, KEY, Control(None))
    called = as_its_card_says(job.folder / "results/model", **places)
    read: list[str] = []
    tokenizer = called.__globals__["tokenizer"]
    called.__globals__["tokenizer"] = _Noting(tokenizer, read)
    called("the cat", *places.values())
    assert read == [said]
    given = {"source": ["the cat"], "target": ["le"], "source_lang": ["de"], "target_lang": ["nl"]}
    if family == "marian":
        given["target_lang"] = ["nld"]
    examples = Translation(task, bases[family], 32).encode(given)
    assert tokenizer(said)["input_ids"] == examples.sequences["input_ids"][0].tolist()


class _Noting:
    """A tokenizer that notes what it reads."""

    def __init__(self, tokenizer: Any, read: list[str]) -> None:
        self.tokenizer, self.read = tokenizer, read

    def __call__(self, text: str, **how: Any) -> Any:
        self.read.append(text)
        return self.tokenizer(text, **how)

    def decode(self, *arguments: Any, **how: Any) -> Any:
        return self.tokenizer.decode(*arguments, **how)


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_on_public_data_it_learns_and_what_it_writes_is_scored(
    tmp_path: Path, bases: dict[str, Path], family: str
) -> None:
    job = make_job(
        tmp_path / "job",
        bases[family],
        family=family,
        task=TASK,
        private=False,
        evaluation="public",
        phases=_phases("full", 150, 1e-2),
        data=translations(60),
    )
    run(job.folder, KEY, Control(None))
    got = job.metrics()
    assert got["token_accuracy"] > 0.8
    assert got["generated_rows"] == 12
    assert got["chrf"] > 60.0
    assert 0.5 < got["rouge1"] <= 1.0
    assert "not_released" not in got
    assert "BLEU" in (job.folder / "results/model/README.md").read_text()


def test_scores_against_counts_by_hand() -> None:
    """Two texts: one right; of the other, two of three words are the reference's, in the same order."""
    got = generated_text.scores(["a b c d e", "the dog runs"], ["a b c d e", "the cat runs"])
    assert got["rouge1"] == pytest.approx((1 + 2 / 3) / 2)
    assert got["rouge2"] == pytest.approx(0.5)
    assert got["rougeL"] == pytest.approx((1 + 2 / 3) / 2)
    # BLEU: matches of 1 to 4 words over all there are, both texts together; no text is too short.
    precisions = [7 / 8, 4 / 6, 3 / 4, 2 / 2]
    assert got["bleu"] == pytest.approx(100 * np.exp(np.mean([math.log(p) for p in precisions])))
    assert generated_text.scores(["x"], ["y"])["chrf"] == 0.0
