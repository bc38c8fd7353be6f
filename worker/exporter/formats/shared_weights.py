"""Weights that several ONNX graphs have in common, in one file beside the first of them.

A tensor of external data names a file, an offset and a length (ONNX IR, "External Tensor Data"); two graphs may name
the same. Each is loaded as ever, by its own path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data

#: Tensors of fewer bytes stay in their graph. The others begin at a multiple of a page, so that they can be mapped.
_LEAST, _PAGE = 1024, 4096


def share(paths: Sequence[Path]) -> None:
    """Moves the larger weights of these graphs, which lie in one folder, to `NAME.data` of the first; each once."""
    models = [onnx.load(path) for path in paths]
    for path in paths:
        _beside(path).unlink(missing_ok=True)
    places: dict[bytes, int] = {}
    with _beside(paths[0]).open("wb") as data:
        for tensor in (tensor for model in models for tensor in model.graph.initializer):
            if len(tensor.raw_data) < _LEAST:
                continue
            content = hashlib.sha256(tensor.raw_data).digest()
            if content not in places:
                data.write(bytes(-data.tell() % _PAGE))
                places[content] = data.tell()
                data.write(tensor.raw_data)
            set_external_data(tensor, _beside(paths[0]).name, places[content], len(tensor.raw_data))
            tensor.ClearField("raw_data")
    for path, model in zip(paths, models, strict=True):
        path.write_bytes(model.SerializeToString())


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")
