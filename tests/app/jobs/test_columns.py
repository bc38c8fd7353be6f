"""What a task reads of a file: columns, classes, ranges and options, named or inferred."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.catalog.bases import BASES, BaseModel
from app.errors import ApiError
from app.files.reader import read
from app.jobs import planning
from app.jobs.facts import FileFacts
from app.jobs.schemas import CreateJob, parsed
from app.privacy.plan import GaussianRelease
from tests.app.files.test_image_zip import CAT
from tests.app.jobs.test_planning import BASE, DEFAULTS, column, file, plan, refusal

IMAGES = BASES["efficientnet-lite0"]


@pytest.mark.parametrize(
    ("name", "changes", "by_admin", "code"),
    [
        ("Topic", {}, False, None),
        ("email", {}, False, "labels_required"),
        ("email", {}, True, None),
        ("email", {"budget": None}, False, None),
        ("topic", {"many": 201}, True, "too_many_classes"),
        ("topic", {"many": 200}, True, None),
        ("topic", {"many": 201, "budget": None}, False, None),
    ],
)
def test_a_class_list_is_taken_from_columns_that_are_named_for_it(
    name: str, changes: dict[str, Any], by_admin: bool, code: str | None
):
    facts = dict(changes)
    classes = [f"c{number}" for number in range(facts.pop("many", 2))]
    training = file(columns=(column("text"), column(name, classes)), **facts)
    request = parsed(
        CreateJob.model_validate({"model": BASE.id, "training_file": "file-1", "task": {"columns": {"label": name}}})
    )
    if code is None:
        planned = planning.plan(request, BASE, training, None, DEFAULTS, by_admin)
        assert planned.resolved["task"]["labels"] == classes
    else:
        with pytest.raises(ApiError) as refused:
            planning.plan(request, BASE, training, None, DEFAULTS, by_admin)
        assert refused.value.code == code


def test_a_refused_column_is_not_looked_at():
    """One class or a thousand: the same refusal, so that it tells nothing of them."""
    for classes in (["only"], None, ["a", "b"]):
        training = file(columns=(column("text"), column("email", classes)))
        assert refusal(training, task={"columns": {"label": "email"}}) == ("labels_required", "task.labels")


def test_named_columns_and_declared_labels():
    planned = plan(
        file(columns=(column("a"), column("b", ["x", "y"]), column("label", ["1", "2"]))),
        task={"columns": {"text": "a", "label": "b"}, "labels": ["y", "x", "z"]},
    )
    assert planned.resolved["task"]["columns"] == {"text": "a", "label": "b"}
    assert planned.resolved["task"]["labels"] == ["y", "x", "z"]
    assert planned.resolved["task"]["labels_source"] == "declared"


def test_missing_values_are_told_by_place_only():
    broken = column("Label", ["neg", "pos"], {"count": 3, "row": 17, "line": 19})
    with pytest.raises(ApiError) as refused:
        plan(file(columns=(column("Sentence"), broken)))
    assert (refused.value.code, refused.value.extra) == ("missing_values", {"line": 19, "row": 17})


# --- other tasks of an encoder ---------------------------------------------------------------------------------------


def scored(low: float = 0.5, high: float = 4.0, **changes: Any) -> FileFacts:
    columns = (column("sentence1"), column("sentence2"), {**column("score"), "range": [low, high]})
    return file(columns=columns, **changes)


def test_a_pair_with_a_score_is_a_regression_over_its_declared_range():
    planned = plan(scored(), task={"range": [0, 5]})
    assert planned.resolved["task"] == {
        "type": "text_regression",
        "columns": {"text": "sentence1", "text_pair": "sentence2", "target": "score"},
        "labels": [],
        "labels_source": "none",
        "max_length": 128,
        "options": {"range": [0.0, 5.0]},
    }
    assert planned.resolved["adaptation"] == {"type": "attentive_head", "num_layers": 3}  # half of six, for a pair
    release = planned.plan.part("evaluation")
    assert isinstance(release, GaussianRelease)
    assert release.sensitivity == pytest.approx(6.0**0.5)


def test_a_private_range_is_never_taken_from_the_file():
    assert refusal(scored()) == ("range_required", "task.range")
    assert refusal(scored(), task={"range": [5, 5]}) == ("invalid_range", "task.range")
    for low, high in ((-1e308, 1e308), (0, 1e300), (0, 1e-300), (1e9, 1e9 + 1)):  # the model answers in float32
        assert refusal(scored(), task={"range": [low, high]}) == ("invalid_range", "task.range")
    for low, high in ((1900, 2100), (1.6e9, 1.7e9), (-1e-6, 1e-6)):
        assert plan(scored(), task={"range": [low, high]}).resolved["task"]["options"] == {"range": [low, high]}
    public = plan(scored(budget=None))
    assert public.resolved["task"]["options"] == {"range": [0.5, 4.0]}
    words = file(columns=(column("text"), {**column("score"), "range": None}))
    assert refusal(words, task={"range": [0, 5]}) == ("target_not_a_number", "training_file")
    assert refusal(scored(), file(param="validation_file", columns=(column("sentence1"), column("sentence2"),
        column("score"))), task={"range": [0, 5]}) == ("target_not_a_number", "validation_file")  # fmt: skip


def test_lists_of_classes_are_several_labels_with_their_sensitivity():
    label = {**column("labels"), "type": "json", "elements": ["a", "b", "c", "d"]}
    planned = plan(file(columns=(column("text"), label)))
    task = planned.resolved["task"]
    assert (task["type"], task["labels"], task["options"]) == (
        "text_classification", ["a", "b", "c", "d"], {"multi_label": True},
    )  # fmt: skip
    release = planned.plan.part("evaluation")
    assert isinstance(release, GaussianRelease)
    assert release.sensitivity == pytest.approx(2.0)
    assert plan().plan.part("evaluation").sensitivity == 1.0  # type: ignore[union-attr]


def test_tokens_and_tags_are_token_classification():
    tags = {**column("ner_tags"), "type": "json", "elements": ["B-PER", "O"]}
    planned = plan(file(columns=({**column("tokens"), "type": "json", "elements": None}, tags)))
    assert planned.resolved["task"]["type"] == "token_classification"
    assert planned.resolved["task"]["labels"] == ["B-PER", "O"]
    assert [part.name for part in planned.plan.parts] == ["head", "evaluation"]  # tokens are not centred


@pytest.mark.parametrize(
    ("base", "last", "code"),
    [
        (BASE, {"tokens": ["a"], "tags": ["O"]}, None),
        (BASE, {"tokens": [], "tags": []}, None),
        (BASE, {"tokens": "a b", "tags": ["O", "B-X"]}, "not_lists"),
        (BASE, {"tokens": ["a", 3], "tags": ["O", "B-X"]}, "not_lists"),
        (BASE, {"tokens": {"a": 1}, "tags": ["O", "B-X"]}, "not_lists"),
        (BASE, {"tokens": ["a", "b"], "tags": [0, 1]}, "not_lists"),  # others are words
        (BASE, {"tokens": [0, 1], "tags": ["O", "B-X"]}, "not_lists"),
        (BASE, {"tokens": ["a", "b"], "tags": ["O", "B-X", "O"]}, "lengths_differ"),
        (BASE, {"text": CAT, "label": "a"}, "not_text"),
        (BASE, {"text": "x", "label": CAT}, "not_text"),
        (IMAGES, {"image": CAT, "label": "a"}, None),
        (IMAGES, {"image": "cat.png", "label": "a"}, "not_images"),
    ],
)
def test_cells_that_no_trainer_can_read_are_refused_before_they_cost_anything(
    tmp_path: Path, base: BaseModel, last: dict[str, Any], code: str | None
):
    """What the trainer finds wrong is charged in full: it has read rows."""
    others = {"tokens": ["a", "b"], "tags": ["O", "B-X"], "text": "x", "image": "dog.png", "label": "b"}
    rows = [{name: others[name] for name in last} for _ in range(20)] + [last]
    if CAT in last.values():  # a column of Parquet is all images, or has none
        first = {name: CAT if value is CAT else others[name] for name, value in last.items()}
        pq.write_table(pa.Table.from_pylist([first, last]), tmp_path / "source")
    else:
        (tmp_path / "source").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "out").mkdir()
    found = read(tmp_path / "source", "rows", tmp_path / "out/rows.parquet")
    training = file(columns=tuple(found["columns"]))
    request = parsed(CreateJob.model_validate({"model": base.id, "training_file": "file-1"}))
    if code is None:
        planning.plan(request, base, training, None, DEFAULTS)
        return
    with pytest.raises(ApiError) as refused:
        planning.plan(request, base, training, None, DEFAULTS)
    assert (refused.value.code, refused.value.param) == (code, "training_file")
    if code == "lengths_differ":
        assert refused.value.message.startswith("Line 21")
        assert refused.value.extra["line"] == 21


def tagged(*found: str, **changes: Any) -> FileFacts:
    """Tokens, and tags that are integers."""
    lists = {"type": "json", "lists": "some digest"}
    tags = {**column("ner_tags"), **lists, "list_items": "integers", "elements": sorted(found)}
    return file(columns=({**column("tokens"), **lists, "list_items": "strings", "elements": None}, tags), **changes)


NAMES = ["O", "B-PER", "I-PER"]


@pytest.mark.parametrize(
    ("found", "labels", "wanted"),
    [
        (("0", "1", "2"), NAMES, (NAMES, "declared", {"label_ids": True})),
        (("0", "2"), NAMES, (NAMES, "declared", {"label_ids": True})),
        (("0", "10", "2"), None, (["0", "2", "10"], "file", {})),  # the place of a number is the number, without gaps
        (("0", "1", "2"), ["2", "1", "0"], (["2", "1", "0"], "declared", {})),  # these are their names
        (("0", "3"), NAMES, "label_not_declared"),
        (("-100", "0", "1"), NAMES, "label_not_declared"),
        (("0", "1", "2"), ["1", "2", "3"], "label_not_declared"),
        (("0", "1", "2"), ["1", "2", "good"], "label_not_declared"),
        (("0",), NAMES, "one_class_only"),
    ],
)
def test_tags_that_are_integers_are_the_places_of_declared_names(
    found: tuple[str, ...], labels: list[str] | None, wanted: Any
):
    task = {} if labels is None else {"labels": labels}
    if isinstance(wanted, str):
        assert refusal(tagged(*found), task=task)[0] == wanted
        return
    resolved = plan(tagged(*found), task=task).resolved["task"]
    assert resolved["type"] == "token_classification"
    assert (resolved["labels"], resolved["labels_source"], resolved["options"]) == wanted


def test_both_files_say_numbers_or_both_say_names():
    other = {"param": "validation_file", "id": "file-2"}
    options = plan(tagged("0", "1"), tagged("0", "2", **other), task={"labels": NAMES}).resolved["task"]["options"]
    assert options == {"label_ids": True}
    for training, held_out in ((("0", "1"), ("O", "B-PER")), (("O", "B-PER"), ("0", "1")), (("0", "1"), ("3",))):
        assert refusal(tagged(*training), tagged(*held_out, **other), task={"labels": NAMES})[0] == "label_not_declared"


def test_classes_of_texts_may_be_numbers_too():
    numbers = file(columns=(column("text"), column("label", ["0", "1"])))
    resolved = plan(numbers, task={"labels": ["negative", "positive"]}).resolved["task"]
    assert (resolved["labels"], resolved["options"]) == (["negative", "positive"], {"label_ids": True})
    several = {**column("labels"), "type": "json", "lists": "x", "list_items": "integers", "elements": ["0", "1", "27"]}
    resolved = plan(file(columns=(column("text"), several))).resolved["task"]
    assert (resolved["labels"], resolved["options"]) == (["0", "1", "27"], {"multi_label": True})


def test_an_option_of_another_task_is_refused_by_name():
    assert refusal(task={"type": "text_classification", "range": [0, 1]}) == ("unknown_parameter", "task.range")


def test_what_a_request_says_of_its_task_counts_before_the_files_columns():
    """A range is a regression's, whatever the column is called: here its cells are no numbers."""
    assert refusal(task={"range": [0, 1]}) == ("target_not_a_number", "training_file")
    labels = file(columns=(column("text"), {**column("label"), "range": [0.0, 1.0]}))
    resolved = plan(labels, task={"range": [0, 1]}).resolved
    assert resolved["task"]["type"] == "text_regression"
    assert resolved["adaptation"] == {"type": "attentive_head", "num_layers": 4}
    assert refusal(labels) == ("too_many_classes", "task.columns.label")


def test_options_and_labels_are_refused_where_a_task_has_none():
    assert refusal(scored(), task={"type": "text_regression", "range": [0, 5], "labels": ["a", "b"]}) == (
        "unknown_parameter", "task.labels",
    )  # fmt: skip
