"""Planning for bases that generate: tasks inferred from columns, chats that are none refused with their place."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from app.catalog.bases import BaseModel
from app.catalog.families import FAMILIES
from app.catalog.languages import M2M_100, MBART_50
from app.errors import ApiError
from app.jobs import planning
from app.jobs.planning import Planned
from app.jobs.schemas import CreateJob, parsed
from tests.app.jobs.test_planning import BASE, DEFAULTS, column, file


def base(family: str, **changes: Any) -> BaseModel:
    return dataclasses.replace(BASE, id="tiny", family=family, tasks=FAMILIES[family].tasks, max_length=256, **changes)


def plan(
    family: str,
    *columns: dict[str, Any],
    bias_parameters: int = 0,
    languages: tuple[str, ...] = (),
    language_pair: tuple[str, ...] = (),
    **body: Any,
) -> Planned:
    request = parsed(CreateJob.model_validate({"model": "tiny", "training_file": "file-1", **body}))
    planned_on = base(family, bias_parameters=bias_parameters, languages=languages, language_pair=language_pair)
    return planning.plan(request, planned_on, file(columns=columns), None, DEFAULTS)


def chat(name: str, holds: str = "messages", **invalid: Any) -> dict[str, Any]:
    return {**column(name), "type": "json", "chat": {"holds": holds, "invalid": invalid or None}}


@pytest.mark.parametrize(
    ("columns", "task", "roles"),
    [
        ((chat("messages"),), "chat", {"messages": "messages"}),
        ((chat("Messages"), chat("tools", "tools")), "chat", {"messages": "Messages", "tools": "tools"}),
        ((column("prompt"), column("completion")), "instruction", {"instruction": "prompt", "response": "completion"}),
        (
            (column("instruction"), column("context"), column("response"), column("text")),
            "instruction",
            {"instruction": "instruction", "context": "context", "response": "response"},
        ),
        ((column("text"),), "language_modeling", {"text": "text"}),
    ],
)
def test_the_task_of_a_causal_base_follows_from_the_columns(
    columns: tuple[dict[str, Any], ...], task: str, roles: dict[str, str]
) -> None:
    resolved = plan("llama", *columns).resolved
    assert (resolved["task"]["type"], resolved["task"]["columns"]) == (task, roles)
    assert resolved["task"]["max_length"] == (128 if task == "language_modeling" else 256)
    assert resolved["auto"]["adaptation"] == "pretrained_head"


def test_rows_may_be_without_tools_and_context() -> None:
    missing = {"count": 3, "row": 1, "line": 2}
    told = plan("llama", chat("messages"), {**chat("tools", "tools"), "nulls": missing}).resolved["task"]["columns"]
    assert told == {"messages": "messages", "tools": "tools"}
    with pytest.raises(ApiError) as refused:
        plan("llama", {**chat("messages"), "nulls": missing})
    assert refused.value.code == "missing_values"


@pytest.mark.parametrize(
    ("columns", "code", "says"),
    [
        ((chat("messages", code="no_assistant_message", row=7, line=9),), "invalid_messages", "Line 9, row 7: A chat"),
        ((column("messages"),), "invalid_messages", "A chat is a JSON list"),
        ((chat("messages", "tools"),), "invalid_messages", "A chat is a JSON list"),
        ((chat("messages"), chat("tools", "tools", code="not_tools", row=1)), "invalid_tools", "Row 1: Tools"),
    ],
)
def test_what_is_no_chat_is_refused_before_anything_is_spent(
    columns: tuple[dict[str, Any], ...], code: str, says: str
) -> None:
    with pytest.raises(ApiError) as refused:
        plan("llama", *columns)
    assert (refused.value.code, refused.value.param) == (code, "training_file")
    assert refused.value.message.startswith(says)


def test_bias_terms_that_there_are_none_of_cannot_train() -> None:
    body = {"adaptation": {"type": "bitfit"}}
    with pytest.raises(ApiError) as refused:
        plan("llama", column("text"), **body)
    assert refused.value.code == "adaptation_not_supported"
    assert plan("gpt2", column("text"), bias_parameters=9, **body).resolved["adaptation"]["type"] == "bitfit"


@pytest.mark.parametrize(
    ("family", "columns", "task", "options"),
    [
        ("t5", ("document", "summary"), "summarization", {"max_target_length": 128, "source_prefix": "summarize: "}),
        ("bart", ("document", "summary"), "summarization", {"max_target_length": 128}),
        ("marian", ("src", "tgt"), "translation", {"max_target_length": 128}),
        ("mt5", ("input", "target"), "text_to_text", {"max_target_length": 128}),
    ],
)
def test_the_task_of_an_encoder_and_decoder_follows_from_the_columns(
    family: str, columns: tuple[str, str], task: str, options: dict[str, Any]
) -> None:
    resolved = plan(family, *map(column, columns)).resolved["task"]
    assert (resolved["type"], resolved["options"]) == (task, options)
    assert resolved["columns"] == dict(zip(("source", "target"), columns, strict=True))


@pytest.mark.parametrize(
    ("family", "known", "languages", "prefix"),
    [
        ("t5", (), ("en", "de"), "translate English to German: "),
        ("mt5", (), ("English", "Luxembourgish"), "translate English to Luxembourgish: "),
        ("marian", ("deu", "fra"), ("eng", "fra"), ">>fra<< "),
    ],
)
def test_languages_become_what_the_base_was_trained_to_read(
    family: str, known: tuple[str, ...], languages: tuple[str, str], prefix: str
) -> None:
    block = {"source_lang": languages[0], "target_lang": languages[1]}  # says that it is a translation
    resolved = plan(family, column("source"), column("target"), languages=known, task=block).resolved["task"]
    assert resolved["type"] == "translation"
    assert resolved["options"] == {**block, "max_target_length": 128, "source_prefix": prefix}


@pytest.mark.parametrize(
    ("family", "known", "block", "param"),
    [
        ("bart", (), {"source_lang": "en", "target_lang": "de"}, "task.source_lang"),
        ("marian", (), {"source_lang": "en", "target_lang": "de"}, "task.target_lang"),  # of two languages only
        ("marian", ("fra",), {"source_lang": "en", "target_lang": "deu"}, "task.target_lang"),
        ("t5", (), {"source_lang": "en", "target_lang": "qx"}, "task.target_lang"),
        ("t5", (), {"source_lang": "en"}, "task.target_lang"),
        ("t5", (), {"source_lang": "en", "target_lang": "de", "source_prefix": "x: "}, "task.source_prefix"),
        ("t5", (), {"columns": {"target_lang": "to"}}, "task.columns"),  # both, or none
        ("t5", (), {"columns": {"source_lang": "from", "target_lang": "to"}, "target_lang": "de"}, "task.target_lang"),
        ("bart", (), {"columns": {"source_lang": "from", "target_lang": "to"}}, "task.columns"),
    ],
)
def test_languages_that_a_base_cannot_be_told_are_refused(
    family: str, known: tuple[str, ...], block: dict[str, Any], param: str
) -> None:
    columns = [column(name) for name in ("source", "target", "from", "to")]
    with pytest.raises(ApiError) as refused:
        plan(family, *columns, languages=known, task={"type": "translation", **block})
    assert (refused.value.code, refused.value.param) == ("invalid_languages", param)


@pytest.mark.parametrize("said", [("en", "fr"), ("English", "French")])
def test_a_translator_for_one_pair_may_be_told_it_and_no_other(said: tuple[str, str]) -> None:
    columns = [column(name) for name in ("source", "target", "source_lang", "target_lang")]
    block = {"source_lang": said[0], "target_lang": said[1]}
    resolved = plan("marian", *columns, language_pair=("en", "fr"), task=block).resolved["task"]
    assert resolved["options"] == {**block, "max_target_length": 128}  # no words before a source
    with pytest.raises(ApiError, match="from en into fr") as refused:
        plan("marian", *columns, language_pair=("en", "fr"), task={"source_lang": "en", "target_lang": "de"})
    assert (refused.value.code, refused.value.param) == ("invalid_languages", "task.target_lang")
    by_row = plan("marian", *columns, language_pair=("en", "fr"), task={"type": "translation"}).resolved["task"]
    assert (by_row["columns"].keys(), by_row["options"]) == ({"source", "target"}, {"max_target_length": 128})


def in_languages(*pair: list[str] | None) -> list[dict[str, Any]]:
    """Columns of a file whose rows say their languages: these."""
    return [*map(column, ("source", "target")), *map(column, ("source_lang", "target_lang"), pair)]


def test_each_row_may_have_languages_of_its_own() -> None:
    columns = in_languages(["en"], ["Esperanto", "de"])
    resolved = plan("t5", *columns, task={"type": "translation"}).resolved["task"]
    assert resolved["columns"] == {name: name for name in ("source", "target", "source_lang", "target_lang")}
    assert resolved["options"] == {"max_target_length": 128, "languages_of": "t5"}
    other = plan("bart", *columns, task={"type": "translation"}).resolved["task"]  # has no words for them
    assert (other["columns"].keys(), other["options"]) == ({"source", "target"}, {"max_target_length": 128})
    for code in ("en", "zzz"):  # of its source Marian is told nothing
        rows = in_languages([code], ["fra", "ron"])
        told = plan("marian", *rows, languages=("fra", "ron", "spa"), task={"type": "translation"}).resolved["task"]
        assert told["options"] == {"max_target_length": 128, "languages_of": "marian"}


@pytest.mark.parametrize(
    ("family", "pair", "role"),
    [
        ("marian", (["en"], ["fra", "fr"]), "target_lang"),  # `>>fr<<` would be read as what no vocabulary has
        ("marian", (["en"], None), "target_lang"),
        ("t5", (["en"], ["de", "qx"]), "target_lang"),
        ("mt5", (["qx"], ["de"]), "source_lang"),
        ("t5", (["en"], None), "target_lang"),
    ],
)
def test_a_language_of_a_row_that_the_base_does_not_know_is_refused(
    family: str, pair: tuple[list[str] | None, list[str] | None], role: str
) -> None:
    languages = ("fra", "ron") if family == "marian" else ()
    with pytest.raises(ApiError, match=f"A row's {role}") as refused:
        plan(family, *in_languages(*pair), languages=languages, task={"type": "translation"})
    assert (refused.value.code, refused.value.param) == ("invalid_languages", "training_file")
    assert "qx" not in refused.value.message
    if pair[1] is not None:  # one that is not read is not refused
        resolved = plan("bart", *in_languages(*pair), task={"type": "translation"}).resolved["task"]
        assert resolved["columns"].keys() == {"source", "target"}


NLLB = ("deu_Latn", "eng_Latn", "zho_Hans", "zho_Hant")


@pytest.mark.parametrize(
    ("family", "known", "said", "codes"),
    [
        ("mbart", MBART_50, ("en_XX", "de_DE"), ("en_XX", "de_DE")),
        ("mbart", MBART_50, ("en", "de"), ("en_XX", "de_DE")),
        ("m2m_100", M2M_100, ("en", "ast"), ("en", "ast")),
        ("m2m_100", NLLB, ("eng", "zho_Hant"), ("eng_Latn", "zho_Hant")),
    ],
)
def test_a_base_of_many_languages_is_told_its_own_codes(
    family: str, known: tuple[str, ...], said: tuple[str, str], codes: tuple[str, str]
) -> None:
    columns = [column(name) for name in ("source", "target", "target_lang")]
    block = {"source_lang": said[0], "target_lang": said[1]}
    resolved = plan(family, *columns, languages=known, task=block).resolved["task"]
    assert (resolved["type"], resolved["columns"].keys()) == ("translation", {"source", "target"})
    assert resolved["options"] == {"source_lang": codes[0], "target_lang": codes[1], "max_target_length": 128}


@pytest.mark.parametrize(
    ("block", "param"),
    [
        ({}, "task.source_lang"),
        ({"source_lang": "eng_Latn"}, "task.target_lang"),
        ({"source_lang": "eng_Latn", "target_lang": "zho"}, "task.target_lang"),  # which of two?
        ({"source_lang": "eng_Latn", "target_lang": "tlh_Latn"}, "task.target_lang"),
        ({"source_lang": "English", "target_lang": "deu_Latn"}, "task.source_lang"),
        ({"source_lang": "eng_Latn", "target_lang": "deu_Latn", "source_prefix": "x"}, "task.source_prefix"),
        ({"columns": {"target_lang": "to"}, "source_lang": "eng_Latn"}, "task.columns"),
        ({"columns": {"source_lang": "from", "target_lang": "to"}, "source_lang": "eng_Latn"}, "task.columns"),
        ({"columns": {"source_lang": "from", "target_lang": "other"}}, "training_file"),  # rows in none of them
        ({"columns": {"source_lang": "from", "target_lang": "many"}}, "training_file"),
    ],
)
def test_a_base_of_many_languages_that_is_not_told_which_is_refused(block: dict[str, Any], param: str) -> None:
    columns = [
        *(column(name) for name in ("source", "target", "many")),
        column("from", ["eng_Latn"]),
        column("to", ["deu_Latn", "zho_Hans"]),
        column("other", ["deu_Latn", "tlh_Latn"]),
    ]
    with pytest.raises(ApiError) as refused:
        plan("m2m_100", *columns, languages=NLLB, task={"type": "translation", **block})
    assert (refused.value.code, refused.value.param) == ("invalid_languages", param)
    assert "tlh_Latn" not in refused.value.message
    with pytest.raises(ApiError) as refused:  # nothing else that reads a text and writes one
        plan("m2m_100", *columns, languages=NLLB, task={"type": "summarization"})
    assert refused.value.code == "task_not_supported"


def test_each_row_may_have_codes_of_its_own() -> None:
    columns = [column("source"), column("target"), column("src_lang", ["eng_Latn"]), column("tgt_lang", ["zho_Hans"])]
    resolved = plan("m2m_100", *columns, languages=NLLB).resolved["task"]
    assert resolved["columns"] == {
        "source": "source", "target": "target", "source_lang": "src_lang", "target_lang": "tgt_lang"
    }  # fmt: skip
    assert resolved["options"] == {"max_target_length": 128, "languages_of": "m2m_100"}


def test_a_prefix_and_the_length_of_targets_are_options() -> None:
    block = {"type": "translation", "source_prefix": "translate English to German: ", "max_target_length": 20}
    told = plan("t5", column("source"), column("target"), task=block).resolved["task"]["options"]
    assert told == {"source_prefix": "translate English to German: ", "max_target_length": 20}
    for wrong in ({**block, "max_target_length": 257}, {**block, "multi_label": True}):
        with pytest.raises(ApiError) as refused:
            plan("t5", column("source"), column("target"), task=wrong)
        assert refused.value.code in ("invalid_max_length", "unknown_parameter")
    with pytest.raises(ApiError) as refused:
        plan("llama", column("text"), task={"source_prefix": "x"})
    assert refused.value.param == "task.source_prefix"
