"""Tokenizers that come as plain lists of tokens, as older folders of hubs have BERT's and GPT-2's: vocab.txt, or
vocab.json and merges.txt. Looked at before the libraries read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from app.catalog.families import Family
from app.models.folder_reader import VOCABULARY, Refused
from app.models.token_ids import text_of
from app.models.tokenizer_files import MAX_PARSED_BYTES, json_of, vocabulary

WORD_PIECES, MERGES = "vocab.txt", "merges.txt"

#: Which tokenizer a family has where nobody says another, and the tokens that it puts into texts or for them.
_DEFAULTS = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "roberta": "RobertaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "bart": "BartTokenizer",
}
_OF_BERT = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
_OF_ROBERTA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_TOKENS: dict[str, Mapping[str, str]] = {
    "BertTokenizer": _OF_BERT,
    "DistilBertTokenizer": _OF_BERT,
    "RobertaTokenizer": _OF_ROBERTA,
    "BartTokenizer": _OF_ROBERTA,
    "GPT2Tokenizer": {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
}
#: A token that it has besides, by what stands for the unknown.
_MASKS = {"[UNK]": "[MASK]", "<unk>": "<mask>"}

_LINE = re.compile(rb"\r\n|\r|\n")


def is_enough(family: Family) -> bool:
    """Whether the family's tokenizer can be made from lists."""
    return family.model_type in _DEFAULTS


def read(family: Family, config: Mapping[str, Any], small: Mapping[str, bytes]) -> tuple[dict[str, int], set[str]]:
    """Of a folder without tokenizer.json: ids by token, and tokens that its tokenizer's class puts beside them. Raises
    Refused where its lists are none that the libraries would take, or do not fit the weights."""
    said = {**json_of(small, "special_tokens_map.json"), **json_of(small, "tokenizer_config.json")}
    kind = str(said.get("tokenizer_class") or config.get("tokenizer_class") or _DEFAULTS[family.model_type])
    tokens = _TOKENS.get(kind.removesuffix("Fast"))
    if tokens is None:
        raise Refused(
            "no_tokenizer", f"there is no tokenizer.json, without which none is made but {', '.join(_TOKENS)}"
        )
    size = config["vocab_size"]
    needed = {text_of(said.get(name)) or default for name, default in tokens.items()}
    if tokens is _OF_BERT:
        ids = _word_pieces(small, size)
        if lacking := needed - ids.keys():
            raise Refused("invalid_tokenizer", f"{WORD_PIECES} lacks one of {', '.join(sorted(lacking))}")
    else:
        ids = vocabulary(small, VOCABULARY, size, needed)
        _check_merges(small, {*ids})
    mask = _MASKS.get(tokens["unk_token"])
    return ids, {mask} if mask and not said.get("mask_token") else set()


def _word_pieces(small: Mapping[str, bytes], size: int) -> dict[str, int]:
    if WORD_PIECES not in small:
        raise Refused("no_tokenizer", f"there is no tokenizer.json, and no {WORD_PIECES}")
    content = small[WORD_PIECES]
    if len(content) > MAX_PARSED_BYTES:
        raise Refused("file_too_large", f"{WORD_PIECES} has more than {MAX_PARSED_BYTES} bytes")
    lines = _LINE.split(content)
    if not lines[-1]:
        lines.pop()
    if len(lines) > size:
        raise Refused("config_mismatch", f"{WORD_PIECES} has more tokens than the weights")
    try:
        return {line.decode(): index for index, line in enumerate(lines)}
    except UnicodeDecodeError as error:
        raise Refused("invalid_tokenizer", f"{WORD_PIECES} is not UTF-8") from error


def _check_merges(small: Mapping[str, bytes], known: set[str]) -> None:
    """Each line is two tokens that become one."""
    if MERGES not in small:
        raise Refused("no_tokenizer", f"there is no tokenizer.json, and no {MERGES}")
    if len(small[MERGES]) > MAX_PARSED_BYTES:
        raise Refused("file_too_large", f"{MERGES} has more than {MAX_PARSED_BYTES} bytes")
    try:
        lines = small[MERGES].decode().split("\n")
    except UnicodeDecodeError as error:
        raise Refused("invalid_tokenizer", f"{MERGES} is not UTF-8") from error
    for line in lines:
        if not line.strip() or line.startswith("#version"):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or not {*parts, "".join(parts)} <= known:
            raise Refused("invalid_tokenizer", f"{MERGES} has a line that is no two tokens of {VOCABULARY}")
