"""Older folders, whose tokens beside the vocabulary stand in added_tokens.json: read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from app.catalog.families import FAMILIES
from app.models.model_folder import inspect
from tests.trainer.hub_families import make_hub_base
from tests.trainer.jobs import KEY, make_job, phases_for, rows
from tests.trainer.test_hub_families import PLAIN
from tests.trainer.test_hub_folders import laid_out
from worker.trainer.control import Control
from worker.trainer.failure import TrainerFailure
from worker.trainer.families.registry import family_for
from worker.trainer.run import run
from worker.trainer.tasks.registry import TRAINER_TASKS

TEXTS = ["The <note>film was GOOD, awful!", "a <pid> plot <note>", "[MASK]<mask>"]


def with_added_tokens(folder: Path, family: str) -> Path:
    """Two tokens that an older transformers wrote beside the vocabulary, and the rows of the embedding for them."""
    make_hub_base(folder, family)
    size = len(AutoTokenizer.from_pretrained(folder))
    kind: Any = AutoModelForCausalLM if FAMILIES[family].kind == "causal" else AutoModelForMaskedLM
    model = kind.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(size + 2, mean_resizing=False)
    for path in (*folder.glob("model*"), folder / "added_tokens.json"):
        path.unlink(missing_ok=True)
    model.save_pretrained(folder)
    told = folder / "tokenizer_config.json"
    said = json.loads(told.read_text()) if told.exists() else {}
    told.write_text(json.dumps({key: value for key, value in said.items() if key != "added_tokens_decoder"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<note>": size + 1, "<pid>": size}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<pid>"]}))
    return folder


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "qwen2"])
def test_tokens_beside_the_vocabulary_are_read_trained_on_and_in_the_bundle(tmp_path: Path, family: str) -> None:
    """qwen2 has a tokenizer.json that lacks them."""
    folder = with_added_tokens(tmp_path / "hub", family)
    base = laid_out(folder, tmp_path / "base")
    theirs, ours = (AutoTokenizer.from_pretrained(each) for each in (folder, base))
    wanted = theirs(TEXTS)["input_ids"]
    assert ours(TEXTS)["input_ids"] == wanted
    data = [(f"{text} <note>", label) for text, label in rows()]
    causal: dict[str, Any] = {"task": PLAIN, "phases": phases_for("full")[1:]} if family == "qwen2" else {}
    job = make_job(tmp_path / "job", base, family=family, adaptation="full", data=data, **causal)
    run(job.folder, KEY, Control(None))
    bundle = job.folder / "results/model"
    assert AutoTokenizer.from_pretrained(bundle)(TEXTS)["input_ids"] == wanted
    assert inspect(bundle, bundle.parent, "again", "fine_tuned").base.tasks


def test_a_token_that_only_the_library_adds_is_found_before_a_row_is_read(tmp_path: Path) -> None:
    base = laid_out(make_hub_base(tmp_path / "hub", "bert"), tmp_path / "base")
    job = make_job(tmp_path / "job", base)
    task = TRAINER_TASKS["text_classification"](job.spec.task, base, 16)
    model = family_for("bert", "text_classification").load(base, job.spec.task)
    task.prepare(model)
    task.processor.add_tokens(["<one more>"])
    with pytest.raises(TrainerFailure) as caught:
        task.prepare(model)
    assert caught.value.code == "base_model_invalid"
