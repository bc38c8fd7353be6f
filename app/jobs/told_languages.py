"""How the base of a translation is told from which language into which: in the job, or in each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.catalog import languages
from app.catalog.bases import BaseModel
from app.catalog.families import FAMILIES
from app.errors import InvalidRequest
from app.jobs.facts import FileFacts
from app.jobs.schemas import TaskBlock


def tell(
    block: TaskBlock, base: BaseModel, columns: dict[str, str], options: dict[str, Any], files: Sequence[FileFacts]
) -> None:
    """Completes the options of a translation, and leaves out columns of languages that say nothing to this base.
    Raises InvalidRequest `invalid_languages`."""
    if FAMILIES[base.family].language_tokens:
        _tell_codes(block, base, columns, options, files)
    else:
        _tell_words(block, base, columns, options, files)


def _tell_words(
    block: TaskBlock, base: BaseModel, columns: dict[str, str], options: dict[str, Any], files: Sequence[FileFacts]
) -> None:
    """Completes the options of a translation by the words that tell its base the languages; `languages_of` names the
    base's family where each row has languages of its own. Columns of languages that nobody named are left out where the
    base has no words for them. Raises InvalidRequest `invalid_languages`."""
    roles = {"source_lang", "target_lang"}
    if not roles & block.columns.keys() and (roles & options.keys() or "source_prefix" in options):
        for role in roles & columns.keys():
            del columns[role]
    if roles & columns.keys():
        named = roles & block.columns.keys()
        if _is_told(base) and roles <= columns.keys():
            if said := sorted((roles | {"source_prefix"}) & options.keys()):
                raise _no_languages(f"task.{said[0]}", "The languages are said by columns already.")
            _require_in_rows(base, columns, files)
            options["languages_of"] = base.family
        elif named:
            raise _no_languages("task.columns", "This base model is told languages by two columns, or not at all.")
        else:
            for role in roles & columns.keys():
                del columns[role]
        return
    if not roles & options.keys():
        return
    if not languages.speaks(base.family):
        raise _no_languages("task.source_lang", "This base model has no words for a language.")
    if "source_prefix" in options:
        raise _no_languages("task.source_prefix", "Give languages or a prefix, not both.")
    if base.language_pair:
        for role, own in zip(("source_lang", "target_lang"), base.language_pair, strict=True):
            if options.get(role) not in (own, languages.NAMES.get(own)):
                raise _no_languages(
                    f"task.{role}", f"This base model translates from {' into '.join(base.language_pair)}."
                )
        return
    for role in sorted(roles):
        if role not in options:
            raise _no_languages(f"task.{role}", "Give the languages of both sides.")
        if not languages.has_words(base.family, base.languages, role, options[role]):
            raise _no_languages(f"task.{role}", f"This language is not known. {languages.known(base.family)}")
    options["source_prefix"] = languages.prefix(base.family, options["source_lang"], options["target_lang"])


def _tell_codes(
    block: TaskBlock, base: BaseModel, columns: dict[str, str], options: dict[str, Any], files: Sequence[FileFacts]
) -> None:
    """Completes the options of a translation by the codes of a base that needs them, as its tokenizer has them; where
    each row has languages of its own, `languages_of` names the family. Raises InvalidRequest `invalid_languages`."""
    roles = ("source_lang", "target_lang")
    if "source_prefix" in options:
        raise _no_languages("task.source_prefix", "This base model is told languages by their codes alone.")
    said = [role for role in roles if role in options]
    if not said and all(role in columns for role in roles):
        _require_in_rows(base, columns, files)
        options["languages_of"] = base.family
        return
    for role in roles:
        if role in block.columns:
            raise _no_languages("task.columns", "Say both languages by columns, or both by task.source_lang and so on.")
        columns.pop(role, None)
        code = languages.code(options.get(role, ""), base.languages)
        if code is None:
            missing = "Say" if role not in options else "It has no such language: say"
            raise _no_languages(
                f"task.{role}", f"{missing} task.source_lang and task.target_lang. {languages.known(base.family)}"
            )
        options[role] = code


def _require_in_rows(base: BaseModel, columns: Mapping[str, str], files: Sequence[FileFacts]) -> None:
    """Raises InvalidRequest `invalid_languages` where a row says a language that a job may not say either."""
    for role, file in ((role, file) for role in ("source_lang", "target_lang") for file in files):
        found = (file.column(columns[role]) or {}).get("classes")
        if not languages.all_have_words(base.family, base.languages, role, found):
            raise _no_languages(file.param, f"A row's {role} is not known. {languages.known(base.family)}")


def _is_told(base: BaseModel) -> bool:
    """Whether words before a source say languages to this base; of Marian's models only those for several have any."""
    return languages.speaks(base.family) and (base.family != "marian" or bool(base.languages))


def _no_languages(param: str, message: str) -> InvalidRequest:
    return InvalidRequest("invalid_languages", message, param=param)
