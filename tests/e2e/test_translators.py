"""Translators as hubs have them, through the real client: told their languages, trained privately, written with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

from tests.e2e.test_generative import download, upload
from tests.running import Running, wait_for_job
from tests.trainer.hub_folders import make_m2m, make_marian, make_mbart, make_mbart_25, make_nllb
from tests.trainer.seq2seq import translations

#: By the base's name: how it is made, the languages that are said, and the token that a target begins with.
BASES: dict[str, tuple[Callable[[Path], Path], dict[str, str], str | None]] = {
    "Helsinki-NLP/opus-mt-tc-en-fr": (partial(make_marian, separate=True), {}, None),
    "facebook/mbart-large-50": (make_mbart, {"source_lang": "en", "target_lang": "fr_XX"}, "fr_XX"),
    "facebook/mbart-large-cc25": (make_mbart_25, {"source_lang": "en", "target_lang": "fr_XX"}, "fr_XX"),
    "facebook/m2m100_418M": (make_m2m, {"source_lang": "en", "target_lang": "fr"}, "__fr__"),
    "facebook/nllb-200": (make_nllb, {"source_lang": "eng_Latn", "target_lang": "fra_Latn"}, "fra_Latn"),
}
PAIRS = [{"source": source, "target": target} for source, target in translations(300)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, (make, _, _) in BASES.items():
        make(root / name)
    return root


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.client() as opened:
        yield opened


@pytest.fixture(scope="module")
def private(client: openai.OpenAI, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return upload(client, tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


def submit(client: openai.OpenAI, base: str, file: Any, said: dict[str, Any], epochs: int = 6, **body: Any) -> Any:
    return client.fine_tuning.jobs.create(
        model=base,
        training_file=file.id,
        extra_body={
            "task": {"type": "translation", "max_length": 24, "max_target_length": 16, **said},
            "adaptation": {"type": "full"},
            "privacy": {"target_epsilon": 20.0, "target_delta": 1e-5},
            **body,
        },
        hyperparameters={"n_epochs": epochs},
    )


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
@pytest.mark.parametrize("base", BASES)
def test_it_is_trained_privately_and_writes_with_plain_transformers(
    running: Running, client: openai.OpenAI, models: Path, private: Any, tmp_path: Path, base: str
) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    _, said, token = BASES[base]
    job = wait_for_job(client, submit(client, base, private, said).id)
    assert job.status == "succeeded", job.error
    bundle, metrics = download(running, client, job, tmp_path / "bundle")
    assert (metrics["released"], metrics["not_released"]["bleu"]) == ("private", "public_data_only")
    tokenizer, model = AutoTokenizer.from_pretrained(bundle), AutoModelForSeq2SeqLM.from_pretrained(bundle)
    asked = tokenizer(["the cat sleeps"], return_tensors="pt")  # nobody says a language any more
    written = model.generate(**asked, max_new_tokens=8, num_beams=1)[0].tolist()
    if token is not None:
        told = json.loads((bundle / "generation_config.json").read_text())
        begins = [token] if base.endswith("cc25") else ["</s>", token]  # instead of, or behind, what a decoder reads
        assert tokenizer.convert_ids_to_tokens(written[: len(begins)]) == begins
        setting = "decoder_start_token_id" if base.endswith("cc25") else "forced_bos_token_id"
        assert told[setting] == written[len(begins) - 1]
    before = AutoModelForSeq2SeqLM.from_pretrained(models / base)
    given = {**asked, "labels": tokenizer(text_target=["le chat dort"], return_tensors="pt")["input_ids"]}
    with torch.inference_mode():
        assert float(model(**given).loss) < float(before(**given).loss)


def test_a_base_of_many_languages_needs_to_know_which(client: openai.OpenAI, private: Any) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "task.source_lang"),
        ({"source_lang": "en"}, "task.target_lang"),
        ({"source_lang": "en", "target_lang": "tlh"}, "task.target_lang"),
    ]
    for said, param in wrong:
        with pytest.raises(openai.BadRequestError) as refused:
            submit(client, "facebook/m2m100_418M", private, said)
        assert (refused.value.code, refused.value.param) == ("invalid_languages", param)


def test_on_public_rows_in_two_languages_each_is_answered_in_its_own(
    running: Running, client: openai.OpenAI, tmp_path: Path
) -> None:
    """The language is all that tells which word is wanted."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    words = {"fr": "le chat", "de": "dort"}
    rows = [
        {"source": "the cat", "target": text, "source_lang": "en", "target_lang": code}
        for code, text in words.items()
        for _ in range(60)
    ]
    file = upload(client, tmp_path / "rows.jsonl", rows, public=True)
    job = submit(
        client,
        "facebook/m2m100_418M",
        file,
        {},
        40,
        privacy={"mechanism": "none"},
        optimizer={"type": "adamw", "learning_rate": 1e-2},
        evaluation={"split": 0.2},
    )
    job = wait_for_job(client, job.id)
    assert job.status == "succeeded", job.error
    bundle, metrics = download(running, client, job, tmp_path / "bundle")
    assert metrics["chrf"] > 90.0
    tokenizer, model = AutoTokenizer.from_pretrained(bundle), AutoModelForSeq2SeqLM.from_pretrained(bundle)
    tokenizer.src_lang = "en"
    for code, text in words.items():
        asked = tokenizer("the cat", return_tensors="pt")
        how = {"forced_bos_token_id": tokenizer.get_lang_id(code), "max_new_tokens": 8, "num_beams": 1}
        assert tokenizer.decode(model.generate(**asked, **how)[0], skip_special_tokens=True) == text
