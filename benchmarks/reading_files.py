"""What reading a dataset takes: seconds of CPU and peak resident memory of the reading process, format by format.

    python -m benchmarks.reading_files [--megabytes 1000] [--format csv …]

Each file is made of the same kind of rows (a text of some 300 characters and a label; `long`: of 20,000), written to a
temporary folder, and read as the worker reads it: `python -m app.files.reader` with its limits. Beside it, what
`sha256sum` takes of the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.files.limits import limits_for

_WORDS = 50_000


def main(megabytes: int, formats: list[str]) -> None:
    """Prints one line a format."""
    print(f"{'file':<16}{'bytes':>15}{'rows':>12}{'CPU s':>9}{'MB/CPU-s':>10}{'of sha256':>10}{'peak MiB':>10}")
    for name in formats:
        with tempfile.TemporaryDirectory(prefix="privtune-bench-", dir=os.environ.get("TMPDIR")) as folder:
            path = Path(folder) / name
            WRITERS[name](path, megabytes * 10**6)
            measure(path)


def measure(path: Path) -> None:
    """Reads one file and prints what it took."""
    size = path.stat().st_size
    began = time.process_time()
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")
    hashing = time.process_time() - began
    output = path.with_name("output")
    output.mkdir()
    job = {
        "source": str(path),
        "filename": path.name.removeprefix("long-"),
        "unit_column": None,
        "rows": str(output / "rows.parquet"),
        "profile": str(output / "profile.json"),
        "report": str(output / "report.json"),
        "limits": asdict(limits_for(size)),
        "parent": os.getpid(),
    }
    child = subprocess.Popen([sys.executable, "-m", "app.files.reader", json.dumps(job)])
    _, _, usage = os.wait4(child.pid, 0)
    found = json.loads((output / "profile.json").read_text())
    cpu = usage.ru_utime + usage.ru_stime
    print(
        f"{path.name:<16}{size:>15,}{found.get('num_rows') or str(found)[:60]:>12}{cpu:>9.1f}{size / cpu / 1e6:>10.1f}"
        f"{hashing / cpu:>10.3f}{usage.ru_maxrss / 1024:>10.0f}",
        flush=True,
    )


def texts(size: int, words: int = 50) -> Iterator[tuple[str, str]]:
    """Rows of about `size` bytes together."""
    generator = np.random.default_rng(0)
    vocabulary = np.array([f"w{n:x}{'y' * (n % 5)}" for n in range(_WORDS)])
    left = size
    while left > 0:
        for row in generator.integers(0, _WORDS, size=(1000, words)):
            text = ", ".join(vocabulary[row])
            left -= len(text) + 10
            yield text, "positive" if row[0] % 2 else "negative"


def _csv(path: Path, size: int, words: int = 50) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(texts(size, words))


def _jsonl(path: Path, size: int) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts(size))


def _json(path: Path, size: int) -> None:
    with path.open("w") as file:
        for n, (text, label) in enumerate(texts(size)):
            file.write(("," if n else "[") + json.dumps({"text": text, "label": label}))
        file.write("]")


def _batches(size: int) -> Iterator[pa.RecordBatch]:
    rows: list[tuple[str, str]] = []
    for row in texts(size):
        rows.append(row)
        if len(rows) == 10_000:
            yield pa.record_batch([*map(pa.array, zip(*rows, strict=True))], ["text", "label"])
            rows = []


def _parquet(path: Path, size: int) -> None:
    schema = pa.schema([("text", pa.string()), ("label", pa.string())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for batch in _batches(size):
            writer.write_batch(batch)


def _arrow(path: Path, size: int) -> None:
    schema = pa.schema([("text", pa.string()), ("label", pa.string())])
    with pa.ipc.new_file(str(path), schema) as writer:
        for batch in _batches(size):
            writer.write_batch(batch)


def _zst(path: Path, size: int) -> None:
    plain = path.with_name("plain")
    _csv(plain, size)
    with plain.open("rb") as source, pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as out:
        while data := source.read(2**20):
            out.write(data)
    plain.unlink()


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "data.csv": _csv,
    "long-data.csv": lambda path, size: _csv(path, size, 3000),
    "data.jsonl": _jsonl,
    "data.json": _json,
    "data.parquet": _parquet,
    "data.arrow": _arrow,
    "data.csv.zst": _zst,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--format", action="append", choices=[*WRITERS])
    given = parser.parse_args()
    main(given.megabytes, given.format or [*WRITERS])
