"""Folders of models as an operator has them, small and without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from app.models.folder_reader import Refused
from app.models.model_folder import inspect

CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 34,
    "type_vocab_size": 2,
    "_name_or_path": "/home/somebody/bert",
    "gradient_checkpointing": False,
}
SHAPES: dict[str, tuple[int, ...]] = {
    "embeddings.word_embeddings.weight": (20, 8),
    "embeddings.position_embeddings.weight": (34, 8),
    **{f"encoder.layer.{n}.output.dense.weight": (8, 16) for n in range(2)},
    **{f"encoder.layer.{n}.output.dense.bias": (8,) for n in range(2)},
}


def safetensors(shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32", width: int = 4) -> bytes:
    """The file of these tensors, all zeros."""
    header, place = {}, 0
    for name, shape in shapes.items():
        end = place + math.prod(shape) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    return framed(json.dumps(header).encode(), bytes(place))


def framed(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def make_folder(folder: Path, **files: Any) -> Path:
    """A small encoder. files: name (`__` stands for a dot) → its content (bytes, text, JSON); None: left out."""
    contents: dict[str, Any] = {
        "config.json": CONFIG,
        "model.safetensors": safetensors(SHAPES),
        "tokenizer.json": {"version": "1.0"},
        "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "name_or_path": "/home"},
        "README.md": "---\nlanguage: en\nlicense: mit\n---\n# A model\nlicense: gpl\n",
        **{name.replace("__", "."): content for name, content in files.items()},
    }
    folder.mkdir(parents=True)
    for name, content in contents.items():
        if content is not None:
            raw = (
                content if isinstance(content, bytes) else content if isinstance(content, str) else json.dumps(content)
            )
            (folder / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return folder


def refusal(folder: Path, root: Path) -> str:
    """The code with which a base model's folder is refused."""
    with pytest.raises(Refused) as caught:
        inspect(folder, root, folder.name)
    return caught.value.code
