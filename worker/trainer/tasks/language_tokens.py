"""Telling a tokenizer, and what generates, the languages of translators whose texts have a token of theirs.

mBART-50's, M2M-100's and NLLB-200's tokenizers put the source's token before it and the target's before the labels;
the decoder starts with `</s>`, as the model's configuration says, and the first token that it writes is forced.
mBART-25's puts them behind, and the decoder starts with the target's: labels moved by one begin with their end.
"""

from __future__ import annotations

from typing import Any

from worker.trainer.failure import TrainerFailure


def are_read(tokenizer: Any) -> bool:
    """Whether it is such a tokenizer."""
    return hasattr(tokenizer, "src_lang")


def told_to_write(tokenizer: Any) -> str:
    """The setting of generating that holds the token of the language to write."""
    return "decoder_start_token_id" if type(tokenizer).__name__ == "MBartTokenizer" else "forced_bos_token_id"


def tell(tokenizer: Any, source: str, target: str) -> None:
    """From here on it encodes texts in these languages. TrainerFailure `data_mismatch` where it knows one not."""
    for code in (source, target):
        token_id(tokenizer, code)
    tokenizer.tgt_lang = target
    tokenizer.src_lang = source  # which also makes it read sources, for now


def in_python(tokenizer: Any, name: str) -> str:
    """The same token's id as an expression over `tokenizer` and a variable of that name, in plain transformers."""
    lookup = "get_lang_id" if hasattr(tokenizer, "lang_code_to_token") else "convert_tokens_to_ids"
    return f"tokenizer.{lookup}({name})"


def token_id(tokenizer: Any, code: str) -> int:
    """Of the language's token. TrainerFailure `data_mismatch` where there is none."""
    if hasattr(tokenizer, "lang_code_to_token"):  # M2M-100's, whose tokens are called otherwise
        found = tokenizer.get_lang_id(code) if code in tokenizer.lang_code_to_token else None
    else:
        found = tokenizer.convert_tokens_to_ids(code)
    if found is None or found == tokenizer.unk_token_id:
        raise TrainerFailure("data_mismatch", "a language that the base does not know")
    return int(found)
