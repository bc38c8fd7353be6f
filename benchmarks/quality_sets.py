"""The real sets of `benchmarks.quality`: how each becomes an upload, on which base, by which task and settings.

Every slice is evenly spread over its file. Nothing here is shipped: the files are the sets' own, in one folder.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Part = Literal["train", "valid", "test"]
Row = dict[str, Any]

MINILM = "all-MiniLM-L6-v2"


@dataclass(frozen=True, slots=True)
class Workload:
    """One line of the table.

    read: (folder of the sets, part) → rows, or the bytes of a zip of images. headline: metrics of `metrics.json`, with
    what they are multiplied by. settings: of every job, as in the request's body; plain: only of jobs without privacy,
    private: only of the others. after: the workload whose model, trained at the same ε, is the base.
    """

    name: str
    title: str
    base: str
    read: Callable[[Path, Part], list[Row] | bytes]
    task: dict[str, Any]
    headline: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    private: dict[str, Any] = field(default_factory=dict)
    after: str | None = None


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """So many rows, evenly spread; all where there are no more."""
    return [rows[index * len(rows) // count] for index in range(count)] if count < len(rows) else list(rows)


def _table(path: Path, columns: Sequence[str], delimiter: str = "\t") -> list[Row]:
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
        return [dict(zip(columns, row, strict=False)) for row in rows if row]


def sst2(folder: Path, part: Part) -> list[Row]:
    """text, label."""
    name = {"train": "train", "valid": "dev", "test": "test"}[part]
    return _table(folder / "sst2" / f"{name}.tsv", ["text", "label"])


def sms_spam(folder: Path, part: Part) -> list[Row]:
    """text, label, without duplicates; of ten rows one for validation, two to test."""
    rows = _table(folder / "sms_spam" / "sms.tsv", ["label", "text"])
    rows = list({row["text"]: row for row in rows}.values())
    taken = {"train": range(3, 10), "valid": range(2, 3), "test": range(2)}[part]
    return [row for index, row in enumerate(rows) if index % 10 in taken]


def goemotions(rows: int, test: int) -> Callable[[Path, Part], list[Row]]:
    """text, labels (a list)."""

    def read(folder: Path, part: Part) -> list[Row]:
        names = (folder / "goemotions" / "labels.txt").read_text(encoding="utf-8").split()
        name = {"train": "train", "valid": "dev", "test": "test"}[part]
        table = _table(folder / "goemotions" / f"{name}.tsv", ["text", "labels"])
        return [
            {"text": row["text"], "labels": [names[int(index)] for index in row["labels"].split(",")]}
            for row in spread(table, rows if part == "train" else test)
        ]

    return read


def stsb(folder: Path, part: Part) -> list[Row]:
    """text, text_pair, score."""
    name = {"train": "train", "valid": "dev", "test": "test"}[part]
    rows = _table(folder / "stsb" / f"stsb-en-{name}.csv", ["text", "text_pair", "score"], ",")
    return [{**row, "score": float(row["score"])} for row in rows]


def weibo_ner(folder: Path, part: Part) -> list[Row]:
    """tokens, tags. The file's characters end with their place in the word."""
    name = {"train": "train", "valid": "dev", "test": "test"}[part]
    text = (folder / "weibo_ner" / f"weiboNER_2nd_conll.{name}").read_text(encoding="utf-8")
    records = [[line.split("\t") for line in block.splitlines()] for block in text.strip().split("\n\n")]
    return [
        {"tokens": [character[:-1] or " " for character, _ in record], "tags": [tag for _, tag in record]}
        for record in records
    ]


def _e2e(folder: Path, part: Part) -> list[Row]:
    name = {"train": "trainset", "valid": "devset", "test": "testset_w_refs"}[part]
    with (
        zipfile.ZipFile(folder / "e2e_nlg" / "e2e-dataset.zip") as archive,
        archive.open(f"e2e-dataset/{name}.csv") as file,
    ):
        return list(csv.DictReader(io.TextIOWrapper(file, "utf-8")))


def e2e_nlg(rows: int, test: int) -> Callable[[Path, Part], list[Row]]:
    """prompt (meaning representation), completion (reference)."""

    def read(folder: Path, part: Part) -> list[Row]:
        taken = spread(_e2e(folder, part), rows if part == "train" else test)
        return [{"prompt": row["mr"], "completion": row["ref"]} for row in taken]

    return read


def e2e_text(rows: int, test: int) -> Callable[[Path, Part], list[Row]]:
    """text: references alone, of other rows than `e2e_friendly` reads."""

    def read(folder: Path, part: Part) -> list[Row]:
        return [{"text": row["ref"]} for row in spread(_e2e(folder, part)[1::2], rows if part == "train" else test)]

    return read


def e2e_friendly(rows: int, test: int) -> Callable[[Path, Part], list[Row]]:
    """text (reference), label: whether its meaning representation says familyFriendly[yes] or [no]."""

    def read(folder: Path, part: Part) -> list[Row]:
        said = [row for row in _e2e(folder, part)[::2] if "familyFriendly[" in row["mr"]]
        return [
            {"text": row["ref"], "label": "yes" if "familyFriendly[yes]" in row["mr"] else "no"}
            for row in spread(said, rows if part == "train" else test)
        ]

    return read


def dolly(rows: int, test: int, longest: int) -> Callable[[Path, Part], list[Row]]:
    """instruction, context, response of so many characters together at most; every tenth to test, every tenth valid."""

    def read(folder: Path, part: Part) -> list[Row]:
        with gzip.open(folder / "dolly15k" / "dolly15k.jsonl.gz", "rt", encoding="utf-8") as file:
            everything = [json.loads(line) for line in file]
        short = [
            {name: row[name] for name in ("instruction", "context", "response")}
            for row in everything
            if sum(len(row[name] or "") for name in ("instruction", "context", "response")) <= longest
        ]
        taken = {"train": range(2, 10), "valid": range(1, 2), "test": range(1)}[part]
        kept = [row for index, row in enumerate(short) if index % 10 in taken]
        return spread(kept, rows if part == "train" else test)

    return read


def scitldr(rows: int, test: int) -> Callable[[Path, Part], list[Row]]:
    """document (abstract), summary (the first of its references)."""

    def read(folder: Path, part: Part) -> list[Row]:
        name = {"train": "train", "valid": "dev", "test": "test"}[part]
        with (folder / "scitldr" / f"{name}.jsonl").open(encoding="utf-8") as file:
            everything = [json.loads(line) for line in file]
        return [
            {"document": " ".join(row["source"]), "summary": row["target"][0]}
            for row in spread(everything, rows if part == "train" else test)
        ]

    return read


def cifar10(folder: Path, part: Part) -> bytes:
    """A zip of a folder a class. Validation: a fifth of the training set, which training then keeps."""
    if part != "valid":
        return (folder / "cifar10_subset" / f"{part}.zip").read_bytes()
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(folder / "cifar10_subset" / "train.zip") as archive,
        zipfile.ZipFile(packed, "w") as taken,
    ):
        for index, name in enumerate(sorted(archive.namelist())):
            if index % 5 == 0 and not name.endswith("/"):
                taken.writestr(name, archive.read(name))
    return packed.getvalue()


def chance(content: list[Row] | bytes) -> dict[str, float]:
    """What the largest class, or the mean, gives on these rows; {} of texts to be written."""
    if isinstance(content, bytes):
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
        content = [{"label": name.split("/")[-2]} for name in names if not name.endswith("/")]
    if "score" in content[0]:
        values = [row["score"] for row in content]
        mean = sum(values) / len(values)
        return {"correlation": 0.0, "rmse": (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5}
    if "tags" in content[0]:
        shares = [row["tags"].count("O") / len(row["tags"]) for row in content]
        return {"accuracy": sum(shares) / len(shares), "entity_f1": 0.0}
    if "labels" in content[0]:
        return {"f1_micro": 0.0, "f1_macro": 0.0}
    if "label" not in content[0]:
        return {}
    counts = Counter(row["label"] for row in content)
    share = max(counts.values()) / len(content)
    return {"accuracy": share, "f1_macro": 2 * share / (1 + share) / len(counts)}
