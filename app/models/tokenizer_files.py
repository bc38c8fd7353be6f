"""Tokenizers that come as SentencePiece files, as hubs have T5's and Marian's: looked at, without the library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

from app.catalog.families import FAMILIES, Family
from app.models import sentencepiece_file
from app.models.folder_reader import TARGET_VOCABULARY, TOKENIZER, VOCABULARY, Reader, Refused
from app.models.sentencepiece_file import InvalidPieces, Pieces

SENTENCEPIECE_FILES = frozenset(name for family in FAMILIES.values() for name in family.sentencepiece)
#: Of what is parsed here, while requests wait.
MAX_PARSED_BYTES = 16 << 20
MAX_LANGUAGES = 500
_LANGUAGE = re.compile(rb'">>([A-Za-z][A-Za-z_-]{1,15})<<"')
_LANGUAGE_CODE = re.compile(r"[A-Za-z][A-Za-z_-]{1,15}")
#: What Marian's tokenizer and its models cannot do without.
_MARIAN_TOKENS = frozenset({"</s>", "<unk>", "<pad>"})
_FAIRSEQ_PIECES, _FAIRSEQ_TOKENS = ("<unk>", "<s>", "</s>"), ("<s>", "<pad>", "</s>", "<unk>")
#: T5's tokenizer takes this id for what is unknown, and adds so many tokens where it is not told otherwise.
_T5_UNKNOWN, _T5_EXTRA_IDS = 2, 100


def sentencepiece(
    reader: Reader, family: Family, config: Mapping[str, Any], small: Mapping[str, bytes]
) -> tuple[dict[str, bytes], dict[str, int]]:
    """The files that the tokenizer is made from, looked at, and ids by token; none where tokenizer.json stands for
    them. (Marian's own tokenizer reads none, so that both may be needed.) Raises Refused where there is neither."""
    if TOKENIZER in small and family.model_type != "marian":
        return {}, {}
    read = {name: reader.content(name, MAX_PARSED_BYTES) for name in family.sentencepiece}
    found = {name: content for name, content in read.items() if content is not None}
    if not found or found.keys() < read.keys():
        if TOKENIZER in small:
            return {}, {}
        names = (*family.sentencepiece, VOCABULARY) if family.model_type == "marian" else family.sentencepiece
        instead = f", and not all of {', '.join(names)}" if names else ""
        raise Refused("no_tokenizer", f"there is no tokenizer.json{instead}")
    ids: dict[str, int] = {}
    for name, content in found.items():
        try:
            pieces = sentencepiece_file.read(content)
        except InvalidPieces as error:
            raise Refused("invalid_tokenizer", f"{name}: {error}") from error
        if family.model_type == "marian":
            continue
        if family.model_type == "xlm-roberta":
            ids = fairseq_ids(name, pieces, ("<mask>",))
            continue
        extra = json_of(small, "tokenizer_config.json").get("extra_ids", _T5_EXTRA_IDS)
        if not pieces.unigram or pieces.unknown != _T5_UNKNOWN:
            raise Refused("invalid_tokenizer", f"{name} is no unigram model whose piece {_T5_UNKNOWN} is the unknown")
        if type(extra) is not int or not 0 <= extra <= config["vocab_size"] - len(pieces.texts):
            raise Refused("config_mismatch", f"{name} and extra_ids have more tokens than the weights")
        named = [*pieces.texts, *(f"<extra_id_{number}>" for number in reversed(range(extra)))]
        ids = {token: index for index, token in enumerate(named)}
    if family.model_type == "marian":
        ids = _vocabularies(small, config)
    return found, ids


def fairseq_ids(name: str, pieces: Pieces, behind: Sequence[str]) -> dict[str, int]:
    """Of XLM-R and mBART, whose tokenizers move the first pieces. behind: tokens that stand behind them. Raises
    Refused."""
    if not pieces.unigram or pieces.texts[:3] != _FAIRSEQ_PIECES:
        raise Refused("invalid_tokenizer", f"{name} is no unigram model that begins with {', '.join(_FAIRSEQ_PIECES)}")
    if {*behind} & {*pieces.texts}:
        raise Refused("invalid_tokenizer", f"{name} has a piece for what is put behind its pieces")
    return {token: index for index, token in enumerate((*_FAIRSEQ_TOKENS, *pieces.texts[3:], *behind))}


def written_size(config: Mapping[str, Any]) -> Any:
    """Tokens that the model may write: Marian's two sides may have embeddings, and vocabularies, of their own."""
    own = None if config.get("share_encoder_decoder_embeddings", True) else config.get("decoder_vocab_size")
    return own or config.get("vocab_size")


def _vocabularies(small: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, int]:
    """Marian's: one for both sides, or one for each, which have the same ids for what transformers has once. Ids of
    what is read."""
    read, written = config["vocab_size"], written_size(config)
    if json_of(small, "tokenizer_config.json").get("separate_vocabs"):
        ids = vocabulary(small, VOCABULARY, read, _MARIAN_TOKENS)
        target = vocabulary(small, TARGET_VOCABULARY, written, _MARIAN_TOKENS)
        if other := sorted(token for token in _MARIAN_TOKENS if ids[token] != target[token]):
            raise Refused("invalid_tokenizer", f"{other[0]} has another id in {TARGET_VOCABULARY}")
    else:
        ids = vocabulary(small, VOCABULARY, min(read, written), _MARIAN_TOKENS)
    for key in ("pad_token_id", "decoder_start_token_id"):
        if type(config.get(key, 0)) is not int or not 0 <= config.get(key, 0) < min(read, written):
            raise Refused("config_mismatch", f"{key} is none of the weights'")
    return ids


def vocabulary(small: Mapping[str, bytes], name: str, size: int, needed: Set[str]) -> dict[str, int]:
    """Of a file: an id of the weights for each token. needed: without these it is refused."""
    if name not in small:
        raise Refused("no_tokenizer", f"there is no {name}")
    if len(small[name]) > MAX_PARSED_BYTES:
        raise Refused("file_too_large", f"{name} has more than {MAX_PARSED_BYTES} bytes")
    try:
        ids = json.loads(small[name])
    except (ValueError, RecursionError) as error:
        raise Refused("invalid_json", f"{name} is not JSON") from error
    if not isinstance(ids, dict) or not needed <= ids.keys():
        raise Refused("invalid_tokenizer", f"{name} lacks one of {', '.join(sorted(needed))}")
    if not all(type(each) is int and 0 <= each < size for each in ids.values()) or len({*ids.values()}) != len(ids):
        raise Refused("config_mismatch", f"{name} has ids that the weights have not, or one twice")
    return ids


def language_pair(small: Mapping[str, bytes]) -> tuple[str, ...]:
    """Of a Marian model without tokens for languages, as its tokenizer's configuration says it."""
    said = json_of(small, "tokenizer_config.json")
    pair = tuple(str(said.get(key, "")) for key in ("source_lang", "target_lang"))
    return pair if all(map(_LANGUAGE_CODE.fullmatch, pair)) and not languages(small) else ()


def json_of(small: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A file that was rewritten; {} without it."""
    value: dict[str, Any] = json.loads(small.get(name, b"{}"))
    return value


def languages(small: Mapping[str, bytes]) -> tuple[str, ...]:
    """Those that a translation can be asked into by a token before its source."""
    found = {match.decode() for name in (TOKENIZER, VOCABULARY) for match in _LANGUAGE.findall(small.get(name, b""))}
    return tuple(sorted(found)[:MAX_LANGUAGES])
