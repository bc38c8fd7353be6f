"""Folders whose tokenizer is a list of tokens, without tokenizer.json: what is offered, and why others are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.models.model_folder import inspect
from tests.app.models.folders import CONFIG, SHAPES, make_folder, refusal, safetensors
from tests.app.models.test_tokenizer_files import trained

PIECES = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##s", "\u2028"]) + "\n"


def bert(folder: Path, **files: Any) -> Path:
    return make_folder(folder, **{"tokenizer__json": None, "vocab__txt": PIECES, **files})


IDS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "b": 5, "ab": 6, "<mask>": 7}
ROBERTA = {**CONFIG, "model_type": "roberta", "architectures": ["RobertaModel"]}


def roberta(folder: Path, **files: Any) -> Path:
    standard = {"config__json": ROBERTA, "tokenizer__json": None, "tokenizer_config__json": None}
    lists = {"vocab__json": IDS, "merges__txt": "#version: 0.2\na b\n"}
    return make_folder(folder, **{**standard, **lists, **files})


GPT2 = {"model_type": "gpt2", "vocab_size": 4, "n_embd": 8, "n_layer": 1, "n_positions": 16}


def gpt2(folder: Path, **files: Any) -> Path:
    """As many tokens as weights."""
    weights = {"wte.weight": (4, 8), "wpe.weight": (16, 8), "h.0.ln_1.weight": (8,)}
    lists = {"vocab__json": {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}}
    of_gpt2 = {"config__json": GPT2, "model__safetensors": safetensors(weights)}
    return roberta(folder, **{**of_gpt2, **lists, **files})


XLM_ROBERTA_SMALL = {**ROBERTA, "model_type": "xlm-roberta"}
XLM_ROBERTA = {**XLM_ROBERTA_SMALL, "vocab_size": 60}


def xlm_roberta(folder: Path, **files: Any) -> Path:
    weights = safetensors({**SHAPES, "embeddings.word_embeddings.weight": (60, 8)})
    standard = {"config__json": XLM_ROBERTA, "model__safetensors": weights, "sentencepiece__bpe__model": trained()}
    return roberta(folder, **{**standard, "vocab__json": None, "merges__txt": None, **files})


def test_they_are_offered(tmp_path: Path) -> None:
    for make, names in (
        (bert, {"vocab.txt"}),
        (roberta, {"vocab.json", "merges.txt"}),
        (gpt2, {"vocab.json"}),
        (xlm_roberta, {"sentencepiece.bpe.model"}),
    ):
        found = inspect(make(tmp_path / make.__name__), tmp_path, "mine")
        assert names <= found.small.keys()
        assert "tokenizer.json" not in found.small
    unsaid = bert(tmp_path / "unsaid", tokenizer_config__json=None)  # as Bio_ClinicalBERT was for years
    assert "text_classification" in inspect(unsaid, tmp_path, "unsaid").base.tasks


LONG = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(17))])
REFUSED: dict[str, tuple[str, Callable[..., Path], dict[str, Any]]] = {
    "nothing": ("no_tokenizer", bert, {"vocab__txt": None}),
    "more than the weights": ("config_mismatch", bert, {"vocab__txt": LONG}),
    "more than the weights with a mask": ("config_mismatch", bert, {"vocab__txt": LONG.rpartition("\n")[0]}),
    "no unknown": ("invalid_tokenizer", bert, {"vocab__txt": PIECES.replace("[UNK]", "[UNKNOWN]")}),
    "not UTF-8": ("invalid_tokenizer", bert, {"vocab__txt": PIECES.encode() + b"\xff\xfe\n"}),
    "too long": ("file_too_large", bert, {"vocab__txt": b"\n" * (17 << 20)}),
    "a tokenizer that needs a dictionary": (
        "no_tokenizer", bert, {"tokenizer_config__json": {"tokenizer_class": "BertJapaneseTokenizer"}},
    ),
    "no merges": ("no_tokenizer", roberta, {"merges__txt": None}),
    "no vocabulary": ("no_tokenizer", roberta, {"vocab__json": None}),
    "a merge of three": ("invalid_tokenizer", roberta, {"merges__txt": "a b a\n"}),
    "a merge of what is not there": ("invalid_tokenizer", roberta, {"merges__txt": "a c\n"}),
    "a merge into what is not there": ("invalid_tokenizer", roberta, {"merges__txt": "b a\n"}),
    "merges that are not UTF-8": ("invalid_tokenizer", roberta, {"merges__txt": b"\xff \xfe\n"}),
    "merges that are too long": ("file_too_large", roberta, {"merges__txt": b"\n" * (17 << 20)}),
    "an id beyond the weights": ("config_mismatch", roberta, {"vocab__json": {**IDS, "c": 20}}),
    "no end": ("invalid_tokenizer", roberta, {"vocab__json": {"<s>": 0, "<pad>": 1, "<unk>": 2}}),
    "GPT-2's without an end": ("invalid_tokenizer", gpt2, {"vocab__json": {"a": 0, "b": 1, "ab": 2}}),
    "GPT-2's with one more": (
        "config_mismatch", gpt2, {"special_tokens_map__json": {"additional_special_tokens": ["<|sep|>"]}},
    ),
    "XLM-R's without its file": ("no_tokenizer", xlm_roberta, {"sentencepiece__bpe__model": None}),
    "XLM-R's that begins otherwise": (
        "invalid_tokenizer", xlm_roberta, {"sentencepiece__bpe__model": trained(unk_id=0, eos_id=1, bos_id=2)},
    ),
    "XLM-R's with more than the weights": ("config_mismatch", xlm_roberta, {"config__json": XLM_ROBERTA_SMALL,
                                           "model__safetensors": safetensors(SHAPES)}),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_is_refused_with_its_reason(what: str, tmp_path: Path) -> None:
    code, make, files = REFUSED[what]
    assert refusal(make(tmp_path / "mine", **files), tmp_path) == code
