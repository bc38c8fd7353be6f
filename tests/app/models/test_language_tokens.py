"""Folders of translators for many languages: what is offered of them, and every way in which none is."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from app.catalog.languages import M2M_100, MBART_50
from app.models import discovery, sentencepiece_file
from app.models.model_folder import inspect
from app.settings import Settings
from tests.app.models.folders import make_folder, refusal, safetensors
from tests.app.models.test_tokenizer_files import BROKEN, trained

SIZES: dict[str, Any] = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
POSITIONS = {f"model.{side}.embed_positions.weight": (34, 8) for side in ("encoder", "decoder")}


def _weights(size: int, **more: tuple[int, ...]) -> bytes:
    return safetensors({"model.shared.weight": (size, 8), "model.encoder.layers.0.fc1.weight": (8, 8), **more})


def pieces(**options: Any) -> bytes:
    """A SentencePiece model that begins with <unk>, <s>, </s>."""
    return trained(**options)


@cache
def texts() -> tuple[str, ...]:
    return sentencepiece_file.read(pieces()).texts


def mbart(folder: Path, *, size: int | None = None, **files: Any) -> Path:
    size = size or len(texts()) + 54
    standard = {
        "config__json": {**SIZES, "model_type": "mbart", "vocab_size": size},
        "model__safetensors": _weights(size, **POSITIONS),
        "tokenizer__json": None,
        "tokenizer_config__json": {"tokenizer_class": "MBart50TokenizerFast", "src_lang": "en_XX", "vocab_file": "/x"},
        "sentencepiece__bpe__model": pieces(),
    }
    return make_folder(folder, **{**standard, **files})


VOCABULARY: dict[str, int] = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "b": 5}


def m2m(folder: Path, *, size: int = 114, **files: Any) -> Path:
    standard = {
        "config__json": {**SIZES, "model_type": "m2m_100", "vocab_size": size},
        "model__safetensors": _weights(size),
        "tokenizer__json": None,
        "tokenizer_config__json": {"language_codes": "m2m100", "num_madeup_words": 8, "sp_model_kwargs": {"alpha": 1}},
        "vocab__json": VOCABULARY,
        "sentencepiece__bpe__model": pieces(),
    }
    return make_folder(folder, **{**standard, **files})


def added(**ids: int) -> dict[str, Any]:
    """A tokenizer.json with these tokens beside its vocabulary."""
    return {"version": "1.0", "added_tokens": [{"id": index, "content": token} for token, index in ids.items()]}


#: As many as a tokenizer of mBART-50's adds where they are missing.
ALL = {code: index for index, code in enumerate(MBART_50, 20)}


def nllb(folder: Path, **files: Any) -> Path:
    standard = {
        "tokenizer__json": added(eng_Latn=20, zho_Hans=21, en_XX=22),
        "tokenizer_config__json": {"tokenizer_class": "NllbTokenizer", "src_lang": "eng_Latn"},
        "vocab__json": None,
        "sentencepiece__bpe__model": None,
    }
    return m2m(folder, **{**standard, **files})


def test_they_are_offered_with_their_files_and_languages(tmp_path: Path) -> None:
    for make, languages, names in (
        (mbart, tuple(sorted(MBART_50)), {"sentencepiece.bpe.model"}),
        (m2m, tuple(sorted(M2M_100)), {"sentencepiece.bpe.model", "vocab.json"}),
        (nllb, ("eng_Latn", "zho_Hans"), {"tokenizer.json"}),
    ):
        found = inspect(make(tmp_path / make.__name__), tmp_path, "mine")
        assert (found.base.tasks, found.base.languages) == (("translation",), languages)
        assert found.base.language_pair == ()
        assert {*found.small} == {"config.json", "generation_config.json", "tokenizer_config.json", *names}
        assert not {"sp_model_kwargs", "vocab_file"} & json.loads(found.small["tokenizer_config.json"]).keys()
    saved = mbart(tmp_path / "saved", tokenizer__json=added(**ALL), sentencepiece__bpe__model=None)
    assert inspect(saved, tmp_path, "saved").base.languages == tuple(sorted(MBART_50))
    for name, said in (("mbart-large-cc25", {}), ("mbart-large-en-ro", {"tokenizer_class": "MBartTokenizer"})):
        older = mbart(tmp_path / name, size=len(texts()) + 27, tokenizer_config__json=said)
        assert inspect(older, tmp_path, name).base.languages == tuple(sorted(MBART_50[:25]))
    wmt = m2m(tmp_path / "wmt", size=14, tokenizer_config__json={"language_codes": "wmt21"})
    assert len(inspect(wmt, tmp_path, "wmt").base.languages) == 8


def test_the_list_of_bases_tells_their_languages(client: Any, settings: Settings) -> None:
    assert settings.models_dir is not None
    nllb(settings.models_dir / "facebook" / "nllb-200-distilled-600M")
    told = client.get("/v1/base_models/facebook/nllb-200-distilled-600M").json()
    assert (told["languages"], told["tasks"]) == (["eng_Latn", "zho_Hans"], ["translation"])


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"models_dir": tmp_path / "models"})


REFUSED: dict[str, tuple[str, Callable[..., Path], dict[str, Any]]] = {
    "BART's tokenizer": ("invalid_tokenizer", mbart, {"tokenizer_config__json": {"tokenizer_class": "BartTokenizer"}}),
    "another's tokenizer": ("invalid_tokenizer", m2m, {"tokenizer_config__json": {"tokenizer_class": "BertTokenizer"}}),
    "no file of mBART's": ("no_tokenizer", mbart, {"sentencepiece__bpe__model": None}),
    "mBART's of merges": ("invalid_tokenizer", mbart, {"sentencepiece__bpe__model": pieces(model_type="bpe")}),
    "mBART's that begins otherwise": (
        "invalid_tokenizer", mbart, {"sentencepiece__bpe__model": pieces(unk_id=0, eos_id=1, bos_id=2)},
    ),
    "mBART's with a language for a piece": (
        "invalid_tokenizer", mbart, {"size": 99, "sentencepiece__bpe__model": pieces(user_defined_symbols="de_DE")},
    ),
    "more than mBART's weights": ("config_mismatch", mbart, {"size": 60}),
    "a table of positions that is too short": (
        "config_mismatch", mbart, {"model__safetensors": _weights(len(sentencepiece_file.read(pieces()).texts) + 54)},
    ),
    "mBART's languages beyond the weights": (
        "config_mismatch", mbart, {"tokenizer__json": added(**{**ALL, "fr_XX": 99})},
    ),
    "languages that tokenizer.json lacks": (
        "config_mismatch", mbart, {"tokenizer__json": added(en_XX=60, de_DE=61)},  # the rest is put behind them
    ),
    "NLLB's tokens beyond the weights": ("config_mismatch", nllb, {"tokenizer__json": added(eng_Latn=20, more=114)}),
    "tokenizer.json without languages": ("invalid_tokenizer", mbart, {"tokenizer__json": added(mask=3)}),
    "no vocab.json": ("no_tokenizer", m2m, {"vocab__json": None}),
    "no file of M2M-100's": ("no_tokenizer", m2m, {"sentencepiece__bpe__model": None}),
    "no padding": ("invalid_tokenizer", m2m, {"vocab__json": {"<s>": 0, "</s>": 1, "<unk>": 2}}),
    "an id left out": ("config_mismatch", m2m, {"vocab__json": {**VOCABULARY, "b": 9}}),
    "an id twice": ("config_mismatch", m2m, {"vocab__json": {**VOCABULARY, "b": 4}}),
    "languages beyond M2M-100's weights": ("config_mismatch", m2m, {"size": 100}),
    "languages of another time": ("invalid_tokenizer", m2m, {"tokenizer_config__json": {"language_codes": ["en"]}}),
    "NLLB without tokenizer.json": ("no_tokenizer", nllb, {"tokenizer__json": None}),
    "NLLB's languages beyond the weights": ("invalid_tokenizer", nllb, {"tokenizer__json": added(eng_Latn=500)}),
    "code": ("code_in_config", nllb, {"tokenizer_config__json": {"auto_map": {"AutoTokenizer": ["x.Y", None]}}}),
    "another's class": ("code_in_config", m2m, {"tokenizer_config__json": {"tokenizer_class": "x.Y"}}),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_is_refused_with_its_reason(what: str, tmp_path: Path) -> None:
    code, make, files = REFUSED[what]
    assert refusal(make(tmp_path / "mine", **files), tmp_path) == code


def test_broken_files_are_refused_at_the_scan(tmp_path: Path) -> None:
    for number, make_content in enumerate(BROKEN.values()):
        mbart(tmp_path / f"mbart-{number}", sentencepiece__bpe__model=make_content())
        m2m(tmp_path / f"m2m-{number}", sentencepiece__bpe__model=make_content())
    found = discovery.scan(tmp_path)
    assert len(found.refused) == 2 * len(BROKEN)
    assert {reason.code for reason in found.refused.values()} == {"invalid_tokenizer"}
