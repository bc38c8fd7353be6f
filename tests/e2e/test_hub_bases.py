"""Bases in the layouts of today's hubs through the real client: what no folder of ours, saved by us, would show."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.e2e.test_tasks import PRIVATE, ROWS, Trained, lines, logits, scans
from tests.running import Running
from tests.trainer.hub_families import make_hub_base
from tests.trainer.images import picture
from tests.trainer.jobs import rows

#: By the name of what has this layout: vocab.txt alone and norms of old; two heads, and an old name of the processor;
#: bfloat16 in shards.
BASES = {"emilyalsentzer/Bio_ClinicalBERT": "bert", "facebook/deit-tiny-distilled": "deit", "Qwen/Qwen3-0.6B": "qwen3"}
CLINICAL, DEIT, QWEN = BASES


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, family in BASES.items():
        make_hub_base(root / name, family)
    unlisted = make_hub_base(root / "google/gemma-3-270m", "qwen3")
    config = json.loads((unlisted / "config.json").read_text())
    (unlisted / "config.json").write_text(json.dumps({**config, "model_type": "gemma3_text"}))
    return root


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.client() as opened:
        yield opened


def test_a_bert_with_a_list_of_words_alone(running: Running, client: openai.OpenAI, tmp_path: Path) -> None:
    table = {"text": [text for text, _ in rows(ROWS)], "label": [label for _, label in rows(ROWS)]}
    got = Trained(running, client, tmp_path, "notes.jsonl", lines(table), CLINICAL, **PRIVATE)
    model = AutoModelForSequenceClassification.from_pretrained(got.bundle)
    told = logits(AutoModelForSequenceClassification, got.bundle, table["text"]).argmax(1)
    right = [model.config.id2label[int(each)] == label for each, label in zip(told, table["label"], strict=True)]
    assert sum(right) > 0.7 * ROWS


def test_a_distilled_deit(running: Running, client: openai.OpenAI, tmp_path: Path) -> None:
    got = Trained(running, client, tmp_path, "scans.zip", scans(), DEIT, **PRIVATE)
    model = AutoModelForImageClassification.from_pretrained(got.bundle)
    processor = AutoImageProcessor.from_pretrained(got.bundle)
    assert type(model).__name__ == "DeiTForImageClassification"
    fresh = [Image.open(io.BytesIO(picture(number % 2 == 1, 1000 + number))) for number in range(20)]
    with torch.inference_mode():
        told = model(**processor(fresh, return_tensors="pt")).logits.argmax(1)
    right = [model.config.id2label[int(each)] == ("dark", "bright")[n % 2] for n, each in enumerate(told)]
    assert sum(right) >= 16


def test_a_qwen_in_shards_of_bfloat16(running: Running, client: openai.OpenAI, models: Path, tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": label}] for text, label in rows(ROWS)]
    full: dict[str, Any] = {"adaptation": {"type": "full"}}
    got = Trained(running, client, tmp_path, "chats.jsonl", lines({"messages": turns}), QWEN, 10, **PRIVATE, **full)
    assert got.task == "chat"
    tokenizer = AutoTokenizer.from_pretrained(got.bundle)
    told = tokenizer.apply_chat_template(turns[0], return_tensors="pt")
    ids = {"input_ids": told["input_ids"], "labels": told["input_ids"]}
    with torch.inference_mode():
        after, before = (
            float(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(**ids).loss)
            for folder in (got.bundle, models / QWEN)
        )
    assert after < before


def test_an_unlisted_architecture_is_refused_with_its_reason(running: Running, client: openai.OpenAI) -> None:
    headers = {"authorization": f"Bearer {client.api_key}"}
    told = httpx.get(f"{running.url}/v1/base_models/google/gemma-3-270m", headers=headers)
    assert told.status_code == 400
    assert (told.json()["error"]["code"], told.json()["error"]["reason"]) == ("base_model_refused", "unknown_family")
