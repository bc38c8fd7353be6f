"""Translators for many languages, whose texts have a token of their language: mBART, M2M-100 and NLLB-200.

What their tokenizers are made from is looked at as `tokenizer_files` does it, and which languages they know. (Liu et
al. 2020; Tang et al. 2020; Fan et al. 2021; NLLB Team 2022.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from app.catalog.families import Family
from app.catalog.languages import M2M_100, MBART_25, MBART_50, WMT_21
from app.models import sentencepiece_file
from app.models.folder_reader import TOKENIZER, VOCABULARY, Reader, Refused
from app.models.sentencepiece_file import InvalidPieces, Pieces
from app.models.tokenizer_files import MAX_LANGUAGES, MAX_PARSED_BYTES, fairseq_ids, json_of, vocabulary

#: Of each family, tokenizers that say both languages: mBART-25's behind the text, the others in front of it.
_CLASSES = {"mbart": ("MBart50Tokenizer", "MBartTokenizer"), "m2m_100": ("M2M100Tokenizer", "NllbTokenizer")}
_MBART = {"MBart50Tokenizer": MBART_50, "MBartTokenizer": MBART_25}
_DEFAULT = {"mbart": "MBartTokenizer", "m2m_100": "M2M100Tokenizer"}

#: As the tokenizers library writes what was added to a vocabulary.
_ADDED = re.compile(rb'"id":\s*(\d{1,10}),\s*"content":\s*"([A-Za-z]{2,3}_[A-Za-z]{2,4})"')
_NLLB_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")

_M2M_TOKENS = frozenset({"<s>", "<pad>", "</s>", "<unk>"})
_M2M_CODES = {"m2m100": M2M_100, "wmt21": WMT_21}


def read(
    reader: Reader, family: Family, config: Mapping[str, Any], small: Mapping[str, bytes]
) -> tuple[dict[str, bytes], tuple[str, ...], dict[str, int], Sequence[str]]:
    """The files that the tokenizer is made from beside `small`, the codes of its languages, ids by token (none where
    tokenizer.json has them), and tokens that its class puts beside them. Raises Refused."""
    size = config["vocab_size"]
    kind = _tokenizer_class(family, config, small)
    if kind not in _CLASSES[family.model_type]:
        raise Refused("invalid_tokenizer", f"its tokenizer is none of {', '.join(_CLASSES[family.model_type])}")
    found: dict[str, bytes] = {}
    ids: dict[str, int] = {}
    if kind == "M2M100Tokenizer":
        name, content, _ = _pieces(reader, family)
        found[name] = content
        ids, languages = _behind_vocabulary(small, size)
    elif TOKENIZER in small:
        known = _added(small[TOKENIZER], size)
        languages = tuple(code for code in known if kind == "NllbTokenizer" and _NLLB_CODE.fullmatch(code))
        languages += tuple(code for code in _MBART.get(kind, ()) if code in known)
    elif kind == "NllbTokenizer":
        raise Refused("no_tokenizer", f"there is no {TOKENIZER}")
    else:
        name, content, pieces = _pieces(reader, family)
        found[name] = content
        ids, languages = fairseq_ids(name, pieces, (*_MBART[kind], "<mask>")), _MBART[kind]
    if not languages:
        raise Refused("invalid_tokenizer", f"{TOKENIZER} has no token for a language")
    always = (*_MBART[kind], "<mask>") if kind in _MBART else ()
    return found, tuple(sorted(languages)[:MAX_LANGUAGES]), ids, always


def _tokenizer_class(family: Family, config: Mapping[str, Any], small: Mapping[str, bytes]) -> str:
    said = json_of(small, "tokenizer_config.json").get("tokenizer_class") or config.get("tokenizer_class")
    return str(said or _DEFAULT[family.model_type]).removesuffix("Fast")


def _pieces(reader: Reader, family: Family) -> tuple[str, bytes, Pieces]:
    (name,) = family.sentencepiece
    content = reader.content(name, MAX_PARSED_BYTES)
    if content is None:
        raise Refused("no_tokenizer", f"there is no {name}")
    try:
        return name, content, sentencepiece_file.read(content)
    except InvalidPieces as error:
        raise Refused("invalid_tokenizer", f"{name}: {error}") from error


def _behind_vocabulary(small: Mapping[str, bytes], size: int) -> tuple[dict[str, int], tuple[str, ...]]:
    """M2M-100's ids and codes: those of languages stand behind those of vocab.json, which leaves none out."""
    ids = vocabulary(small, VOCABULARY, size, _M2M_TOKENS)
    told = json_of(small, "tokenizer_config.json").get("language_codes", "m2m100")
    codes = _M2M_CODES.get(str(told))
    if codes is None:
        raise Refused("invalid_tokenizer", f"language_codes is none of {', '.join(_M2M_CODES)}")
    if max(ids.values()) != len(ids) - 1 or len(ids) + len(codes) > size:
        raise Refused("config_mismatch", f"{VOCABULARY} and the languages' tokens are not those of the weights")
    return ids | {f"__{code}__": len(ids) + place for place, code in enumerate(codes)}, codes


def _added(tokenizer: bytes, size: int) -> tuple[str, ...]:
    return tuple(code.decode() for index, code in _ADDED.findall(tokenizer) if int(index) < size)
