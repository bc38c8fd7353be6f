"""Ids that a tokenizer gives: folders with one that the weights have no row for, and tokens of added_tokens.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from app.models import token_ids
from app.models.model_folder import inspect
from tests.app.models.folders import make_folder, refusal
from tests.app.models.test_plain_vocabulary import bert, gpt2, roberta, xlm_roberta
from tests.app.models.test_tokenizer_files import marian, mt5, spiece, trained

#: Of weights with 20 rows.
WORDS = {f"w{index}": index for index in range(18)}


def tokenizer(*added: tuple[str, int], vocab: Any = WORDS, kind: str = "WordPiece") -> dict[str, Any]:
    """A tokenizer.json as the library writes it."""
    beside = [{"id": index, "content": token, "single_word": False, "special": True} for token, index in added]
    return {"version": "1.0", "added_tokens": beside, "normalizer": None, "model": {"type": kind, "vocab": vocab}}


def pieces(count: int) -> list[list[Any]]:
    return [[f"w{index}", -1.5] for index in range(count)]


SAID = {"tokenizer_class": "BertTokenizer"}
FITTING: dict[str, dict[str, Any]] = {
    "fewer than the weights": {"tokenizer__json": tokenizer()},
    "as many, with what is beside": {"tokenizer__json": tokenizer(("[PAD]", 18), ("w3", 3), ("[MASK]", 19))},
    "pieces and scores": {"tokenizer__json": tokenizer(vocab=pieces(20), kind="Unigram")},
    "a token that is named and there": {
        "tokenizer__json": tokenizer(("[PAD]", 18), ("[MASK]", 19)),
        "tokenizer_config__json": {**SAID, "pad_token": "[PAD]", "mask_token": {"content": "[MASK]"}},
        "special_tokens_map__json": {"pad_token": "[PAD]", "additional_special_tokens": ["w4"]},
    },
    "one that an old file names and a new one does not": {
        "tokenizer__json": tokenizer(("[PAD]", 18), ("[MASK]", 19)),
        "tokenizer_config__json": {**SAID, "added_tokens_decoder": {"18": {"content": "[PAD]"}}},
        "special_tokens_map__json": {"additional_special_tokens": ["<other>"]},  # is not read then
        "added_tokens__json": {"<other>": 20},  # nor this
    },
}


@pytest.mark.parametrize("what", FITTING)
def test_a_tokenizer_may_have_as_many_tokens_as_the_weights_or_fewer(what: str, tmp_path: Path) -> None:
    found = inspect(make_folder(tmp_path / "mine", **FITTING[what]), tmp_path, "mine")
    assert "added_tokens.json" not in found.small


BEYOND: dict[str, dict[str, Any]] = {
    "words": {"tokenizer__json": tokenizer(vocab={f"w{index}": index for index in range(21)})},
    "a word behind a gap": {"tokenizer__json": tokenizer(vocab={"a": 0, "b": 20})},
    "a word that is written otherwise": {"tokenizer__json": tokenizer(vocab={'"vocab": {"a": 1': 0, '\\"': 20})},
    "pieces": {"tokenizer__json": tokenizer(vocab=pieces(21), kind="Unigram")},
    "a token beside the words": {"tokenizer__json": tokenizer(("[PAD]", 18), ("[MASK]", 19), ("<|im_start|>", 20))},
    "padding that is named": {
        "tokenizer__json": tokenizer(("a", 18), ("b", 19)), "tokenizer_config__json": {**SAID, "pad_token": "[PAD]"}
    },
    "a token that is named beside others": {
        "tokenizer__json": tokenizer(("a", 18)),
        "special_tokens_map__json": {"additional_special_tokens": ["a", {"content": "<b>"}, "<c>"]},
    },
    "tokens of a newer file": {
        "tokenizer__json": tokenizer(("a", 18)),
        "tokenizer_config__json": {**SAID, "added_tokens_decoder": {"18": {"content": "a"}, "19": {"content": "<b>"},
                                                                    "20": {"content": "<c>"}}},
    },
    "tokens of an older file": {
        "tokenizer__json": tokenizer(("a", 18)), "added_tokens__json": {"a": 18, "<b>": 19, "<c>": 20}
    },
}  # fmt: skip


@pytest.mark.parametrize("what", BEYOND)
def test_a_token_that_the_weights_have_no_row_for_refuses_the_folder(what: str, tmp_path: Path) -> None:
    """A row of data with that very text would end its job, and be charged."""
    assert refusal(make_folder(tmp_path / "mine", **BEYOND[what]), tmp_path) == "config_mismatch"


def size_of(content: bytes) -> int:
    return sentencepiece.SentencePieceProcessor(model_proto=content).get_piece_size()


#: Tokens of each; of XLM-R's also padding and a mask.
MADE: list[tuple[Callable[..., Path], int]] = [
    (bert, 8), (roberta, 8), (xlm_roberta, size_of(trained()) + 2), (mt5, size_of(spiece()))
]  # fmt: skip


@pytest.mark.parametrize(("make", "size"), MADE)
def test_added_tokens_are_read_with_the_ids_behind_the_vocabulary(
    make: Callable[..., Path], size: int, tmp_path: Path
) -> None:
    for number, (added, code) in enumerate(
        [
            ({"<pid>": size, "<note>": size + 1}, None),
            ({"<note>": size + 1, "<pid>": size}, None),
            ({"<pid>": size + 1}, "invalid_tokenizer"),
            ({"<pid>": size, "<note>": size}, "invalid_tokenizer"),
            ({"<pid>": 2}, "invalid_tokenizer"),
            ({f"<{index}>": size + index for index in range(200)}, "config_mismatch"),
            ({"<pid>": "8"}, "invalid_tokenizer"),
            ({"<pid>": True}, "invalid_tokenizer"),
            ({"": size}, "invalid_tokenizer"),
        ]
    ):
        folder = make(tmp_path / str(number), added_tokens__json=added)
        if code is None:
            assert json.loads(inspect(folder, tmp_path, "mine").small["added_tokens.json"]) == added
        else:
            assert refusal(folder, tmp_path) == code


def test_added_tokens_of_old_files_mostly_repeat_the_vocabulary(tmp_path: Path) -> None:
    repeated = {"[UNK]": 1, "[CLS]": 2}
    found = inspect(bert(tmp_path / "mine", added_tokens__json=repeated), tmp_path, "mine")
    assert json.loads(found.small["added_tokens.json"]) == repeated
    assert "added_tokens.json" not in inspect(bert(tmp_path / "other", added_tokens__json={}), tmp_path, "o").small
    assert refusal(bert(tmp_path / "moved", added_tokens__json={"[UNK]": 5}), tmp_path) == "invalid_tokenizer"
    assert refusal(gpt2(tmp_path / "full", added_tokens__json={"<b>": 4}), tmp_path) == "config_mismatch"
    assert refusal(marian(tmp_path / "marian", added_tokens__json={"<b>": 64}), tmp_path) == "config_mismatch"


def test_a_tokenizer_that_is_no_json_refuses_the_folder(tmp_path: Path) -> None:
    for number, content in enumerate(['{"model": {"vocab": {"a": 0', '{"added_tokens": [', '{"added_tokens": [{}']):
        assert refusal(make_folder(tmp_path / str(number), tokenizer__json=content), tmp_path) == "invalid_tokenizer"
    assert token_ids.of_tokenizer_json(json.dumps(tokenizer(("x", 30), vocab=pieces(2))).encode()) == {
        "w0": 0, "w1": 1, "x": 30
    }  # fmt: skip
