"""Which ids a tokenizer gives, held against the weights' rows: a row of data may have any of its tokens in its text.

Tokens stand in a vocabulary or beside it. Those beside it are named by tokenizer_config.json, or, in older folders, by
special_tokens_map.json and added_tokens.json, and get the ids behind it, as transformers (5.23, `_from_pretrained`)
and the tokenizers library (0.23, `AddedVocabulary`) give them. A trainer looks once more, at the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from app.models.folder_reader import TOKENIZER, Reader, Refused, dumped
from app.models.tokenizer_files import json_of

ADDED_TOKENS = "added_tokens.json"

_MANY = ("additional_special_tokens", "extra_special_tokens")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: Where the tokenizers library writes both. Parsed by themselves: merges are most of such a file.
_MODEL, _VOCABULARY, _ADDED = (re.compile(rf'"{key}"\s*:\s*(?=[\[{{])') for key in ("model", "vocab", "added_tokens"))


def added_tokens(reader: Reader, small: Mapping[str, bytes]) -> dict[str, bytes]:
    """added_tokens.json, {token: id}, where transformers reads it. Raises Refused."""
    if "added_tokens_decoder" in json_of(small, "tokenizer_config.json"):
        return {}  # says all of it
    found = reader.json(ADDED_TOKENS) or {}
    if not all(type(index) is int for index in found.values()) or "" in found:
        raise Refused("invalid_tokenizer", f"{ADDED_TOKENS} has a token without an id, or an empty one")
    return {ADDED_TOKENS: dumped(found)} if found else {}


def of_tokenizer_json(content: bytes) -> dict[str, int]:
    """Ids by token, as far as it has them where the tokenizers library looks. Raises Refused."""
    text = content.decode(errors="replace")
    model = _MODEL.search(text)
    vocabulary = _value(_VOCABULARY, text, model.end()) if model else None
    if isinstance(vocabulary, list):  # pieces and their scores
        vocabulary = {str(each[0]): place for place, each in enumerate(vocabulary) if isinstance(each, list) and each}
    ids = {token: index for token, index in (vocabulary or {}).items() if type(index) is int}
    for each in _value(_ADDED, text, 0) or ():
        match each:
            case {"id": int(index), "content": str(token)}:
                ids[token] = index
    return ids


def _value(key: re.Pattern[str], text: str, start: int) -> Any:
    found = key.search(text, start)
    if found is None:
        return None
    try:
        return json.JSONDecoder().raw_decode(text, found.end())[0]
    except (ValueError, RecursionError) as error:
        raise Refused("invalid_tokenizer", f"{TOKENIZER} is not JSON") from error


def check(ids: Mapping[str, int], small: Mapping[str, bytes], size: int, more: Iterable[str] = ()) -> None:
    """ids: of the vocabulary. size: rows of the embedding, of which a tokenizer may leave some out. more: tokens that
    the tokenizer's class puts beside the vocabulary, if they are not in it.

    Raises Refused `config_mismatch` where a token has an id without a row, and `invalid_tokenizer` where one of
    added_tokens.json would get another id than it has there.
    """
    following = max(len(ids), max(ids.values(), default=-1) + 1)
    added = json_of(small, ADDED_TOKENS)
    for token, index in sorted(added.items(), key=lambda entry: int(entry[1])):
        if index != ids.get(token, following):
            raise Refused(
                "invalid_tokenizer",
                f"{ADDED_TOKENS} has ids that are not those behind the vocabulary, in their order: transformers would "
                "give these tokens others",
            )
        following += token not in ids
    if following + len({*more, *_named(small)} - ids.keys() - added.keys() - {""}) > size:
        raise Refused("config_mismatch", "the tokenizer has more tokens than the weights")


def _named(small: Mapping[str, bytes]) -> list[str]:
    """Tokens that the configuration names, wherever they stand."""
    said = json_of(small, "tokenizer_config.json")
    decoder = said.get("added_tokens_decoder")
    if decoder is None:
        said |= json_of(small, "special_tokens_map.json")
    named = [said.get(key) for key in _NAMED]
    for key in _MANY:
        many = said.get(key)
        named += many.values() if isinstance(many, dict) else many if isinstance(many, list) else ()
    return [*map(text_of, named), *map(text_of, decoder.values() if isinstance(decoder, dict) else ())]


def text_of(token: Any) -> str:
    """Of a special token, which may be written with more about it; "" of none."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
