"""A learnable toy table for every task on encoders, and bases for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from tests.trainer.jobs import BAD, GOOD, make_base, rows
from worker.trainer.spec import TaskSpec

PAIR = TaskSpec("text_classification", {"text": "a", "text_pair": "b", "label": "c"}, ("same", "other"), max_length=16)
MULTI = TaskSpec(
    "text_classification", {"text": "a", "label": "c"}, ("good", "film", "plot"), max_length=16,
    options={"multi_label": True},
)  # fmt: skip
REGRESSION = TaskSpec(
    "text_regression", {"text": "a", "target": "c"}, (), max_length=16, options={"range": [10.0, 50.0]}
)
TOKENS = TaskSpec("token_classification", {"tokens": "a", "tags": "c"}, ("O", "GOOD", "BAD"), max_length=16)
MASKED = TaskSpec("masked_lm", {"text": "a"}, (), max_length=16)
SPECS = {"pair": PAIR, "multi": MULTI, "regression": REGRESSION, "tokens": TOKENS, "masked": MASKED}


def toy_table(name: str, count: int) -> dict[str, list[str]]:
    """Learnable from the words of a text."""
    texts = [text for text, _ in rows(count)]
    words = [text.split() for text in texts]
    if name == "pair":
        other = [GOOD[0] if index % 4 < 2 else BAD[0] for index in range(count)]
        good = [bool({*GOOD} & {*each}) for each in words]
        same = ["same" if first == (second == GOOD[0]) else "other" for first, second in zip(good, other, strict=True)]
        return {"a": texts, "b": other, "c": same}
    if name == "multi":
        facts = [[bool({*GOOD} & {*each}), "film" in each, "plot" in each] for each in words]
        chosen = [[label for label, holds in zip(MULTI.labels, each, strict=True) if holds] for each in facts]
        return {"a": texts, "c": [json.dumps(each) for each in chosen]}
    if name == "regression":
        return {"a": texts, "c": ["50" if {*GOOD} & {*each} else "10.0" for each in words]}
    if name == "tokens":
        tags = [["GOOD" if word in GOOD else "BAD" if word in BAD else "O" for word in each] for each in words]
        return {"a": [json.dumps(each) for each in words], "c": [json.dumps(each) for each in tags]}
    return {"a": texts}


def make_encoder_base(folder: Path, name: str, family: str) -> Path:
    """Of jobs' encoder; for `masked` with a head of its own."""
    make_base(folder, family)
    if name == "masked":
        sizes: dict[str, Any] = {
            name: value
            for name, value in json.loads((folder / "config.json").read_text()).items()
            if name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        }
        torch.manual_seed(7)
        model = (
            BertForMaskedLM(BertConfig(**sizes, max_position_embeddings=34))
            if family == "bert"
            else RobertaForMaskedLM(RobertaConfig(**sizes, max_position_embeddings=34, pad_token_id=0))
        )
        model.save_pretrained(folder)
    return folder
