"""Files that mean harm, or that nobody would make on purpose: each with its name and the code that answers it."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from app.files.limits import MAX_CELL_BYTES, MAX_COLUMNS, MAX_ROW_BYTES
from tests.app.files.test_arrow import ipc
from tests.app.files.test_image_zip import CAT, linked, packed
from tests.app.files.test_images import encoded, gradient
from tests.app.files.test_text_formats import zstd

SECRET = b"Ludwig-was-here"
GOOD = b"text,label\n" + b"fine,pos\n" * 50

Case = tuple[str, Callable[[], bytes], str]


def parquet(table: pa.Table | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [SECRET.decode()] * 2000}) if table is None else table, out, **options)
    return out.getvalue()


def flipped(data: bytes, at: int, count: int = 16) -> bytes:
    """With some bytes turned over; `at` counts from the end where it is negative."""
    at = at % len(data)
    return data[:at] + bytes(byte ^ 0xFF for byte in data[at : at + count]) + data[at + count :]


def footer(thrift: bytes) -> bytes:
    """A Parquet file that is nothing but this metadata."""
    return b"PAR1" + thrift + struct.pack("<I", len(thrift)) + b"PAR1"


def deep_schema(levels: int) -> bytes:
    """Compact Thrift: version 1, a schema of nested groups."""
    count = levels + 1
    size = bytes([count & 0x7F | 0x80, count >> 7 & 0x7F | 0x80, count >> 14])
    element = b"\x35\x00\x18\x01a\x15\x02\x00"  # required, named a, one child
    leaf = b"\x15\x0c\x25\x00\x18\x01a\x00"  # bytes, required
    return b"\x15\x02\x19\xfc" + size + element * levels + leaf + b"\x16\x02\x19\x0c\x00"


def png(width: int, height: int) -> bytes:
    """A header that promises so many pixels, and hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (1, 1)), "BMP"))
    struct.pack_into("<ii", data, 18, width, height)
    return bytes(data)


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(gradient(16, 16), "JPEG"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


def images(*cells: bytes) -> bytes:
    return parquet(pa.table({"image": [*cells], "label": ["a"] * len(cells)}))


def gz_bomb(layers: int = 1) -> bytes:
    data = gzip.compress(bytes(2**20) * 300, 1)
    return data if layers == 1 else gzip.compress(data)


def zip_of_links() -> bytes:
    return packed((linked(), b"/etc/passwd"))


def zip_with_huge_directory() -> bytes:
    data = packed(("cat/1.png", CAT))
    at = data.index(b"PK\x05\x06")
    return data[: at + 12] + struct.pack("<II", 2**32 - 2, 2**32 - 2) + data[at + 20 :]


def claims_to_be_long() -> bytes:
    """Its last entry's data would end within the directory."""
    data = bytearray(packed(("cat/1.png", CAT)))
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 20, len(data))
    return bytes(data)


def nested_bomb() -> bytes:
    """A row of lists of lists, whose text is longer than a cell may be."""
    row = pa.array([[["x" * 1000] * 100] * 100])
    return ipc(pa.table({"x": pa.concat_arrays([row] * 2)}))


def repeated(text: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))


def dictionary_bomb() -> bytes:
    return ipc(pa.table({"x": repeated("x" * 1_000_000, 20_000)}), compression="zstd")


def arrow_length(claim: int) -> bytes:
    """A stream whose first message says it is so long."""
    return b"\xff\xff\xff\xff" + struct.pack("<i", claim) + b"\0" * 64


def utf16(data: bytes) -> bytes:
    return data.decode().encode("utf-16")


CASES: dict[str, Case] = {
    # nothing there
    "nothing": ("a.csv", lambda: b"", "empty_file"),
    "white space": ("a.jsonl", lambda: b" \r\n\t\n" * 100, "empty_file"),
    "zeros": ("a.csv", lambda: bytes(100_000), "no_header"),
    "zeros without a name": ("data", lambda: bytes(100_000), "format_unknown"),
    "a program": ("data", lambda: b"\x7fELF" + bytes(range(1, 9)) * 40, "format_unknown"),
    "a program called csv": ("a.csv", lambda: b"\x7fELF" + bytes(range(256)) * 40, "undecodable_bytes"),
    # text
    "a line without end": ("a.csv", lambda: b"text,label\n" + b"x" * (MAX_ROW_BYTES * 3), "row_too_long"),
    "a header without end": ("a.csv", lambda: b"x" * (MAX_ROW_BYTES * 3), "no_header"),
    "commas without end": ("a.csv", lambda: b"," * 1_000_000 + b"\n", "too_many_columns"),
    "quotes without end": ("a.csv", lambda: GOOD + b'"' + b"x\n" * 3_000_000, "cell_too_long"),
    "a quote in a quote": ("a.csv", lambda: GOOD + b'"a"b",pos\n', "broken_quotes"),
    "a large cell": ("a.csv", lambda: GOOD + b"x" * (MAX_CELL_BYTES + 9) + b",pos\n", "cell_too_long"),
    "ragged": ("a.csv", lambda: GOOD + SECRET + b"\n", "too_few_cells"),
    "wide": ("a.csv", lambda: GOOD + SECRET + b",a,b\n", "too_many_cells"),
    "two columns of a name": ("a.csv", lambda: b"text,Text\na,b\n", "duplicate_column"),
    "a name of control characters": ("a.csv", lambda: b"te\x1bxt,label\na,b\n", "no_header"),
    "a name that turns the line": ("a.csv", lambda: "te\u202ext,label\na,b\n".encode(), "no_header"),
    "utf-16": ("a.csv", lambda: utf16(GOOD), "undecodable_bytes"),
    "utf-16 lines": ("a.jsonl", lambda: utf16(b'{"a": "b"}\n'), "undecodable_bytes"),
    "latin-1": ("a.csv", lambda: GOOD + "Größe,pos\n".encode("latin-1"), "undecodable_bytes"),
    "cut in a character": ("a.csv", lambda: GOOD + "fine,Größe".encode()[:-2], "undecodable_bytes"),
    "overlong utf-8": ("a.csv", lambda: GOOD + b"\xc0\xaf,pos\n", "undecodable_bytes"),
    "a surrogate in utf-8": ("a.csv", lambda: GOOD + b"\xed\xa0\x80,pos\n", "undecodable_bytes"),
    "a null character": ("a.tsv", lambda: b"text\tlabel\na\0\tb\n", "null_character"),
    # JSON
    "NaN": ("a.jsonl", lambda: b'{"a": NaN}\n', "invalid_json"),
    "-Infinity": ("a.json", lambda: b'[{"a": -Infinity}]', "invalid_json"),
    "a huge number": ("a.jsonl", lambda: b'{"a": 1e400}\n', "number_not_finite"),
    "a huge number within": ("a.json", lambda: b'[{"a": [{"b": 1e400}]}]', "number_not_finite"),
    "a number of many digits": ("a.jsonl", lambda: b'{"a": ' + b"9" * 1_000_000 + b"}", "invalid_json"),
    "deep lists": ("a.jsonl", lambda: b'{"a": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", "invalid_json"),
    "deep objects": ("a.json", lambda: b'[{"a":' * 300_000, "invalid_json"),
    "keys without end": (
        "a.jsonl",
        lambda: json.dumps({f"k{n}": n for n in range(MAX_COLUMNS + 1)}).encode(),
        "too_many_columns",
    ),
    "half a character": ("a.jsonl", lambda: b'{"a": ["\\ud800"]}\n', "undecodable_bytes"),
    "a string without end": ("a.json", lambda: b'[{"a": "' + b"x" * (3 * MAX_ROW_BYTES), "row_too_long"),
    "a list of lists": ("a.json", lambda: b"[[]]", "not_an_object"),
    "two arrays": ("a.json", lambda: b'[{"a": 1}][{"a": 1}]', "invalid_json"),
    "a proto": ("a.jsonl", lambda: b'{"": {"__proto__": 1}}\n', "column_name_invalid"),
    # CoNLL
    "a sentence without end": ("a.conll", lambda: (b"x" * 2**20 + b" O\n") * 9, "row_too_long"),
    "a tag missing": ("a.conll", lambda: b"a O\n" + SECRET + b"\n", "too_few_cells"),
    # packed
    "a bomb in gzip": ("a.csv.gz", gz_bomb, "unpacks_too_large"),
    "a bomb in gzip twice": ("a.csv.gz", lambda: gz_bomb(2), "nested_archive"),
    "a bomb in zstd": ("a.csv.zst", lambda: zstd(bytes(2**20) * 300), "unpacks_too_large"),
    "gzip cut off": ("a.csv.gz", lambda: gzip.compress(GOOD)[:-5], "invalid_compression"),
    "zstd cut off": ("a.csv.zst", lambda: zstd(GOOD)[:-1], "invalid_compression"),
    "garbage behind gzip": ("a.csv.gz", lambda: gzip.compress(GOOD) + SECRET, "invalid_compression"),
    "garbage behind zstd": ("a.csv.zst", lambda: zstd(GOOD) + SECRET, "invalid_compression"),
    "a wrong checksum": ("a.csv.gz", lambda: flipped(gzip.compress(GOOD), -8, 4), "invalid_compression"),
    "a window of gigabytes": ("a.zst", lambda: b"\x28\xb5\x2f\xfd\x00\xf8" + bytes(64), "invalid_compression"),
    "tar in gzip": (
        "a.tar.gz",
        lambda: gzip.compress(b"../../etc/passwd".ljust(257, b"\0") + b"ustar"),
        "format_unknown",
    ),
    # Parquet
    "a footer of nothing": ("a.parquet", lambda: footer(b""), "invalid_parquet"),
    "a footer longer than the file": ("a.parquet", lambda: parquet()[:-8] + b"\xff\xff\xff\x7fPAR1", "invalid_parquet"),
    "a footer turned over": ("a.parquet", lambda: flipped(parquet(), -60), "invalid_parquet"),
    "a page turned over": ("a.parquet", lambda: flipped(parquet(), 30, 40), "invalid_parquet"),
    "a thrift list of billions": (
        "a.parquet",
        lambda: footer(b"\x15\x02\x19\xfc\xff\xff\xff\xff\x07"),
        "invalid_parquet",
    ),
    "a thrift text of billions": (
        "a.parquet",
        lambda: footer(b"\x15\x02\x19\x1c\x48\xff\xff\xff\xff\x07"),
        "invalid_parquet",
    ),
    "a schema too deep": ("a.parquet", lambda: footer(deep_schema(100_000)), "invalid_parquet"),
    "rows that are not there": ("a.parquet", lambda: parquet()[:4] + parquet()[2000:], "invalid_parquet"),
    "an encrypted footer": ("a.parquet", lambda: parquet()[:-4] + b"PARE", "invalid_parquet"),
    "infinity": ("a.parquet", lambda: parquet(pa.table({"x": [1.0, float("inf")]})), "number_not_finite"),
    "a dictionary of one long text": (
        "a.parquet",
        lambda: parquet(pa.table({"x": repeated("x" * 100_000, 20_000)}), compression="zstd"),
        "unpacks_too_large",
    ),
    # Arrow
    "a dictionary bomb": ("a.arrow", dictionary_bomb, "unpacks_too_large"),
    "a nested bomb": ("a.arrow", nested_bomb, "cell_too_long"),
    "a message of gigabytes": ("a.arrow", lambda: arrow_length(2**31 - 1), "invalid_arrow"),
    "a message of less than nothing": ("a.arrow", lambda: arrow_length(-7), "invalid_arrow"),
    "no schema": ("a.arrow", lambda: arrow_length(0), "invalid_arrow"),
    "metadata turned over": (
        "a.arrow",
        lambda: flipped(ipc(pa.table({"x": [1, 2]}), stream=True), 24),
        "invalid_arrow",
    ),
    "a billion rows of nothing": (
        "a.arrow",
        lambda: ipc(pa.Table.from_batches([pa.record_batch({"x": pa.nulls(10**9)})])),
        "too_many_rows",
    ),
    "a type of one's own": (
        "a.arrow",
        lambda: ipc(pa.table({"x": pa.array([b"xx"], pa.binary(2))})),
        "unsupported_column",
    ),
    "a file of Feather 1": ("a.feather", lambda: b"FEA1" + bytes(100) + b"FEA1", "invalid_arrow"),
    # images
    "a PNG of gigapixels": ("a.parquet", lambda: images(png(60_000, 60_000)), "image_too_large"),
    "a PNG without its pixels": ("a.parquet", lambda: images(png(6000, 6000)), "invalid_image"),
    "a PNG of no size": ("a.parquet", lambda: images(png(0, 0)), "not_an_image"),
    "a BMP of gigapixels": ("a.parquet", lambda: images(bmp(2**30, 2**30)), "image_too_large"),
    "a JPEG of gigapixels": ("a.parquet", lambda: images(jpeg_of(65_000, 65_000)), "image_too_large"),
    "a JPEG cut off": ("a.parquet", lambda: images(encoded(gradient(300, 300), "JPEG")[:-999]), "invalid_image"),
    "an SVG": ("a.parquet", lambda: images(CAT, b"<svg onload='alert(1)'/>"), "not_an_image"),
    "a GIF called PNG": ("a.zip", lambda: packed(("a/1.png", encoded(gradient(4, 4), "GIF"))), "not_an_image"),
    "a TIFF called JPEG": ("a.zip", lambda: packed(("a/1.jpg", encoded(gradient(4, 4), "TIFF"))), "not_an_image"),
    "EPS, which runs programs": ("a.zip", lambda: packed(("a/1.png", encoded(gradient(4, 4), "EPS"))), "not_an_image"),
    "a text of megabytes in a PNG": (
        "a.zip",
        lambda: packed(("a/1.png", CAT[:33] + png(1, 1)[33:-12] + b"\xff\xff\xff\xffzTXt" + bytes(99))),
        "invalid_image",
    ),
    # zip
    "a name that leads out": ("a.zip", lambda: packed(("a/../../b/1.png", CAT)), "unsafe_name"),
    "a name from the root": ("a.zip", lambda: packed(("/etc/cron.d/1.png", CAT)), "unsafe_name"),
    "a name for Windows": ("a.zip", lambda: packed(("a\\..\\1.png", CAT)), "unsafe_name"),
    "a link": ("a.zip", zip_of_links, "link_in_archive"),
    "a bomb": ("a.zip", lambda: packed(*((f"a/{n}.png", bytes(2**24)) for n in range(17))), "unpacks_too_large"),
    "a zip in a zip": ("a.zip", lambda: packed(("a/1.png", packed(("a/1.png", CAT)))), "nested_archive"),
    "a zip cut off": ("a.zip", lambda: packed(("a/1.png", CAT))[:-30], "invalid_archive"),
    "a directory of gigabytes": ("a.zip", zip_with_huge_directory, "invalid_archive"),
    "an entry over the directory": ("a.zip", claims_to_be_long, "invalid_archive"),
    "a zip behind a picture": ("a.zip", lambda: CAT + packed(("a/1.png", CAT)), "invalid_archive"),
    "a wrong checksum in a zip": (
        "a.zip",
        lambda: packed(("a/1.png", CAT), method=zipfile.ZIP_STORED).replace(CAT, flipped(CAT, 40, 1)),
        "invalid_archive",
    ),
    "a path in the table": (
        "a.zip",
        lambda: packed(("1.png", CAT), ("metadata.csv", b"file_name,label\n../../../etc/passwd,x\n")),
        "image_not_found",
    ),
    "a picture that is a path": (
        "a.parquet",
        lambda: parquet(
            pa.table(
                {
                    "image": pa.array(
                        [{"bytes": None, "path": "/etc/passwd"}],
                        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
                    )
                }
            )
        ),
        "not_an_image",
    ),
}
