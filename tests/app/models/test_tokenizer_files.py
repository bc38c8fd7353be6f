"""Folders whose tokenizer is made from SentencePiece files: what is offered of them, and every way in which none is."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from app.models import discovery, sentencepiece_file
from app.models.folder_reader import Refused
from app.models.model_folder import inspect
from app.models.sentencepiece_file import InvalidPieces
from app.settings import Settings
from tests.app.models.folders import make_folder, refusal, safetensors

TEXTS = ["the cat sleeps", "the dog runs at ten", "no ﬁne cat runs"] * 20
SIZES: dict[str, Any] = {"vocab_size": 64, "d_model": 8}
MARIAN: dict[str, Any] = {
    **SIZES, "model_type": "marian", "architectures": ["MarianMTModel"], "encoder_layers": 1, "decoder_layers": 1,
    "max_position_embeddings": 32, "bad_words_ids": [[63]], "num_beams": 6, "decoder_start_token_id": 63,
}  # fmt: skip
T5: dict[str, Any] = {**SIZES, "model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"], "num_layers": 1}
SHAPES = {"shared.weight": (64, 8), "encoder.layers.0.fc1.weight": (8, 8)}
BLOCKS = {"shared.weight": (64, 8), "encoder.block.0.layer.0.o.weight": (8, 8), "lm_head.weight": (64, 8)}


@cache
def trained(**options: Any) -> bytes:
    """A model file of the library's own."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=made, vocab_size=40, hard_vocab_limit=False, minloglevel=2,
        num_threads=1, **options,
    )  # fmt: skip
    return made.getvalue()


def side() -> bytes:
    return trained(unk_id=0, eos_id=1, bos_id=-1)


def spiece(**options: Any) -> bytes:
    return trained(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, **options)


def marian(folder: Path, **files: Any) -> Path:
    ids = {token: index for index, token in enumerate(["</s>", "<unk>", *sentencepiece_file.read(side()).texts[2:]])}
    standard = {
        "config__json": MARIAN,
        "model__safetensors": safetensors(SHAPES),
        "tokenizer__json": None,
        "tokenizer_config__json": {"source_lang": "en", "target_lang": "fr"},
        "vocab__json": {**ids, "<pad>": 63},
        "source__spm": side(),
        "target__spm": side(),
    }
    return make_folder(folder, **{**standard, **files})


def mt5(folder: Path, **files: Any) -> Path:
    standard = {
        "config__json": T5,
        "model__safetensors": safetensors(BLOCKS),
        "tokenizer__json": None,
        "tokenizer_config__json": {"extra_ids": 0, "special_tokens_map_file": "/home/somebody"},
        "spiece__model": spiece(),
    }
    return make_folder(folder, **{**standard, **files})


def test_marian_is_offered_with_its_files_tasks_and_languages(tmp_path: Path) -> None:
    found = inspect(marian(tmp_path / "opus-mt-en-fr"), tmp_path, "opus-mt-en-fr")
    assert found.base.tasks == ("text_to_text", "translation", "summarization")
    assert (found.base.languages, found.base.language_pair) == ((), ("en", "fr"))
    assert {"source.spm", "target.spm", "vocab.json", "tokenizer_config.json"} <= found.small.keys()
    assert found.small["source.spm"] == side()
    # Where there is no generation_config.json, the model's configuration has it.
    assert json.loads(found.small["generation_config.json"])["bad_words_ids"] == [[63]]
    assert "bad_words_ids" not in json.loads(found.small["config.json"])
    several = {**json.loads(found.small["vocab.json"]), ">>fra<<": 61, ">>por_BR<<": 62}
    other = inspect(marian(tmp_path / "many", vocab__json=several), tmp_path, "many").base
    assert (other.languages, other.language_pair) == (("fra", "por_BR"), ())


def test_marian_with_a_vocabulary_for_each_side_is_offered(tmp_path: Path) -> None:
    smaller = {**APART, "vocab_size": 70, "decoder_vocab_size": 64}
    weights = {"encoder.embed_tokens.weight": (70, 8), "decoder.embed_tokens.weight": (64, 8), "layers.0.x": (8, 8)}
    files = {**SEPARATE, "config__json": smaller, "model__safetensors": safetensors(weights)}
    found = inspect(marian(tmp_path / "mine", **files), tmp_path, "mine")
    assert "translation" in found.base.tasks
    assert json.loads(found.small["target_vocab.json"])["le"] == 2
    assert json.loads(found.small["tokenizer_config.json"])["separate_vocabs"] is True


def test_mt5_is_offered_with_its_file(tmp_path: Path) -> None:
    found = inspect(mt5(tmp_path / "mt5-small"), tmp_path, "mt5-small")
    assert "translation" in found.base.tasks
    assert found.small["spiece.model"] == spiece()
    assert "/home" not in found.small["tokenizer_config.json"].decode()
    with_json = inspect(mt5(tmp_path / "both", tokenizer__json={}, spiece__model=b"broken"), tmp_path, "both")
    assert "spiece.model" not in with_json.small  # tokenizer.json stands for it


def test_the_list_of_bases_tells_languages(client: Any, settings: Settings) -> None:
    assert settings.models_dir is not None
    marian(settings.models_dir / "opus-mt-en-fr")
    listed = {base["id"]: base for base in client.get("/v1/base_models").json()["data"]}
    told = listed["opus-mt-en-fr"]
    assert (told["language_pair"], told["languages"], "translation" in told["tasks"]) == (["en", "fr"], [], True)
    assert listed["all-MiniLM-L6-v2"]["language_pair"] is None


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"models_dir": tmp_path / "models"})


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc_cf", "identity"])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_pieces_are_those_of_the_library(rule: str, kind: str) -> None:
    content = trained(model_type=kind, normalization_rule_name=rule)
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    read = sentencepiece_file.read(content)
    assert list(read.texts) == [model.id_to_piece(index) for index in range(model.get_piece_size())]
    assert (read.unknown, read.unigram) == (model.unk_id(), kind == "unigram")


def field(number: int, content: bytes) -> bytes:
    """Of bytes, in protobuf's format."""
    length, size = b"", len(content)
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def piece(text: bytes, score: float = 0.0, kind: int = 1) -> bytes:
    return field(1, field(1, text) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind]))


def charsmap(units: list[int], strings: bytes = b"a\0") -> bytes:
    """A model with this table of replaced characters, its trie filled up to a block of 256 units."""
    trie = struct.pack("<256I", *units, *[0] * (256 - len(units)))
    return UNKNOWN + field(3, field(2, len(trie).to_bytes(4, "little") + trie + strings))


UNKNOWN = piece(b"<unk>", kind=2)
LEAF, HAS_LEAF, AWAY = 1 << 31, 1 << 8, 300 << 10

BROKEN: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "text": lambda: b"<!DOCTYPE html><html>" * 40,
    "the first half": lambda: side()[: len(side()) // 2],
    "all but the last byte": lambda: side()[:-1],
    "zeros": lambda: bytes(5000),
    "a number without an end": lambda: b"\xff" * 20,
    "a piece of exabytes": lambda: b"\x0a" + b"\xff" * 8 + b"\x7f",
    "a group": lambda: b"\x0b" + UNKNOWN,
    "a number for a piece": lambda: UNKNOWN + b"\x08\x01",
    "nothing unknown": lambda: piece(b"a"),
    "twice unknown": lambda: UNKNOWN + piece(b"other", kind=2),
    "a piece twice": lambda: UNKNOWN + piece(b"a") + piece(b"a"),
    "a piece without a text": lambda: UNKNOWN + piece(b""),
    "a piece with a zero": lambda: UNKNOWN + piece(b"a\0b"),
    "a piece that is not UTF-8": lambda: UNKNOWN + piece(b"\xff\xfe"),
    "a piece of no known type": lambda: UNKNOWN + piece(b"a", kind=9),
    "a byte that is none": lambda: UNKNOWN + piece(b"<0xZZ>", kind=6),
    "a score that is not finite": lambda: UNKNOWN + piece(b"a", float("nan")),
    "a score of two bytes": lambda: UNKNOWN + field(1, field(1, b"a") + field(2, b"ab")),
    "characters cut": lambda: UNKNOWN + field(3, field(2, b"\x00\x04\x00\x00" + bytes(100))),
    "characters of a broken length": lambda: UNKNOWN + field(3, field(2, b"\xff\xff\xff\xff" + bytes(2000))),
    "characters out of the table": lambda: charsmap([AWAY]),
    "characters out of the strings": lambda: charsmap([LEAF | 2]),
    "characters between two bytes": lambda: charsmap([LEAF | 1], "é\0".encode()),
    "characters that are not UTF-8": lambda: charsmap([0], b"\xff\0"),
    "characters without an end": lambda: charsmap([0], b"a"),
    "characters that end nowhere": lambda: charsmap([HAS_LEAF | 1 << 10]),
    "characters of the way back": lambda: UNKNOWN + field(5, field(2, b"\x00\x04\x00\x00" + bytes(100))),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_refused_at_the_scan(what: str, tmp_path: Path) -> None:
    content = BROKEN[what]()
    with pytest.raises(InvalidPieces):
        sentencepiece_file.read(content)
    marian(tmp_path / "marian", target__spm=content)
    mt5(tmp_path / "mt5", spiece__model=content)
    found = discovery.scan(tmp_path)
    assert {name: reason.code for name, reason in found.refused.items()} == dict.fromkeys(
        ("marian", "mt5"), "invalid_tokenizer"
    )
    assert "target.spm: " in str(found.refused["marian"])


@pytest.mark.parametrize(
    "content",
    [
        field(2, b"\x10\x00" * (6 << 20)),
        b"".join(field(1, field(1, b"%07d" % n)) for n in range(sentencepiece_file.MAX_PIECES + 1)),
    ],
    ids=["fields", "pieces"],
)
def test_a_file_of_more_than_any_model_has_is_refused_before_all_of_it_is_read(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever scans a folder answers requests as well."""
    varint, read = sentencepiece_file._varint, []

    def counted(*arguments: Any) -> Any:
        read.append(None)
        return varint(*arguments)

    monkeypatch.setattr(sentencepiece_file, "_varint", counted)
    with pytest.raises(InvalidPieces, match=r"more fields|too many"):
        sentencepiece_file.read(content)
    assert len(read) <= 2 * sentencepiece_file.MAX_FIELDS + 2


def test_the_smallest_tables_are_read() -> None:
    """What the broken ones above are made from is not broken itself."""
    for content in (UNKNOWN + piece(b"a"), charsmap([LEAF | 1, HAS_LEAF | 1 << 10], b"\0\0")):
        assert sentencepiece_file.read(content).unknown == 0


IDS = {"</s>": 0, "<unk>": 1, "<pad>": 63}
APART = {**MARIAN, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 64}
SEPARATE = {
    "config__json": APART, "tokenizer_config__json": {"separate_vocabs": True}, "vocab__json": IDS,
    "target_vocab__json": {**IDS, "le": 2},
}  # fmt: skip
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 800000\n"
REFUSED: dict[str, tuple[str, Callable[..., Path], dict[str, Any]]] = {
    "no target.spm": ("no_tokenizer", marian, {"target__spm": None}),
    "no vocab.json": ("no_tokenizer", marian, {"vocab__json": None}),
    "no spiece.model": ("no_tokenizer", mt5, {"spiece__model": None}),
    "too long": ("file_too_large", marian, {"source__spm": bytes(17 << 20)}),
    "a long vocabulary": ("file_too_large", marian, {"vocab__json": b" " * (17 << 20)}),
    "a pointer": ("git_lfs_pointer", marian, {"source__spm": POINTER}),
    "a pointer for weights": ("git_lfs_pointer", mt5, {"model__safetensors": POINTER}),
    "a list for a vocabulary": ("invalid_tokenizer", marian, {"vocab__json": ["</s>"]}),
    "a deep vocabulary": ("invalid_json", marian, {"vocab__json": "[" * 200_000}),
    "no padding": ("invalid_tokenizer", marian, {"vocab__json": {"</s>": 0, "<unk>": 1}}),
    "an id beyond the weights": ("config_mismatch", marian, {"vocab__json": {**IDS, "a": 64}}),
    "a negative id": ("config_mismatch", marian, {"vocab__json": {**IDS, "a": -1}}),
    "a word for an id": ("config_mismatch", marian, {"vocab__json": {**IDS, "a": "b"}}),
    "an id twice": ("config_mismatch", marian, {"vocab__json": {**IDS, "a": 1}}),
    "no vocabulary of the target": ("no_tokenizer", marian, {**SEPARATE, "target_vocab__json": None}),
    "another padding of the target": (
        "invalid_tokenizer",
        marian,
        {**SEPARATE, "target_vocab__json": {**IDS, "<pad>": 9}},
    ),
    "an id beyond the target's weights": (
        "config_mismatch",
        marian,
        {**SEPARATE, "target_vocab__json": {**IDS, "a": 64}},
    ),
    "a target of more than the weights": (
        "config_mismatch",
        marian,
        {**SEPARATE, "config__json": {**APART, "decoder_vocab_size": 80}},
    ),
    "a start that is no token": ("config_mismatch", marian, {"config__json": {**MARIAN, "decoder_start_token_id": 64}}),
    "padding of one side only": ("config_mismatch", marian, {**SEPARATE, "config__json": {**APART, "vocab_size": 80}}),
    "more pieces than weights": ("config_mismatch", mt5, {"tokenizer_config__json": {"extra_ids": 100}}),
    "extra ids that nobody counted": ("config_mismatch", mt5, {"tokenizer_config__json": {}}),
    "words for a number of extra ids": ("config_mismatch", mt5, {"tokenizer_config__json": {"extra_ids": "0"}}),
    "the unknown elsewhere": ("invalid_tokenizer", mt5, {"spiece__model": side()}),
    "merges": ("invalid_tokenizer", mt5, {"spiece__model": spiece(model_type="bpe")}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_folder_is_refused_with_its_reason(what: str, tmp_path: Path) -> None:
    code, make, files = REFUSED[what]
    assert refusal(make(tmp_path / "mine", **files), tmp_path) == code


def test_a_pickle_alone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = marian(tmp_path / "mine", model__safetensors=None, pytorch_model__bin=b"\x80\x04")
    with pytest.raises(Refused, match=r"pytorch_model\.bin is a pickle.*docs/generative\.md"):
        inspect(folder, tmp_path, "mine")
