"""The header of a safetensors file: names, types and shapes of its tensors, without their data and without torch.

Format: https://huggingface.co/docs/safetensors (eight bytes of length, JSON, data). Nothing of it is trusted: the
header is bounded before it is read, and every tensor lies where the one before it ended.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Headers of models with hundreds of billions of parameters, in one file, stay below.
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 100_000
_MAX_RANK = 8
_COMPARED = 64 << 10

_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U64": 8,
    "U32": 4, "U16": 2,
}  # fmt: skip


class InvalidWeights(ValueError):
    """Not a safetensors file."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """dtype: as the format spells it (F32, BF16, …). start: of its data, in bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    def ends(self) -> tuple[bytes, bytes]:
        """The first and the last bytes of its data, by which learnt tensors differ. Raises OSError."""
        length = self.size * _BYTES[self.dtype]
        with self.path.open("rb") as file:
            file.seek(self.start)
            first = file.read(min(length, _COMPARED))
            file.seek(self.start + length - len(first))
            return first, file.read(len(first))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors by name. Raises InvalidWeights, and OSError."""
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, total - 8):
            raise InvalidWeights("the header is longer than the file, or than any header")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise InvalidWeights("the header is not JSON") from error
    if not isinstance(header, dict):
        raise InvalidWeights("the header is not an object")
    header.pop("__metadata__", None)
    if not 1 <= len(header) <= MAX_TENSORS:
        raise InvalidWeights("no tensors, or too many")
    tensors, places = {}, []
    for name, entry in header.items():
        tensors[name], place = _tensor(entry, path, 8 + length)
        places.append(place)
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise InvalidWeights("tensors overlap, or leave a gap")
        end = stop
    if end != total - 8 - length:
        raise InvalidWeights("the file is longer or shorter than its header says")
    return tensors


def _tensor(entry: Any, path: Path, data: int) -> tuple[TensorInfo, tuple[int, int]]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
            pass
        case _:
            raise InvalidWeights("a tensor is not described")
    if dtype not in _BYTES or len(shape) > _MAX_RANK or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise InvalidWeights("a tensor of unknown type or absurd shape")
    info = TensorInfo(dtype, tuple(shape), path, data + start)
    if start < 0 or stop - start != info.size * _BYTES[dtype]:
        raise InvalidWeights("a tensor's place is not of its size")
    return info, (start, stop)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found
