"""Files of one folder of a model: by exact names, of bounded size, never from outside; JSON without keys of code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.catalog.families import FAMILIES

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, VOCABULARY, TARGET_VOCABULARY = "tokenizer.json", "vocab.json", "target_vocab.json"

#: What is copied as it is, and how large it may be.
PLAIN_FILES = {TOKENIZER: 64 << 20, "vocab.txt": 64 << 20, VOCABULARY: 64 << 20, TARGET_VOCABULARY: 64 << 20,
                "merges.txt": 64 << 20, "chat_template.jinja": 64 << 10}  # fmt: skip

#: A folder with more entries, or with larger JSON, is no model's.
MAX_ENTRIES = 4096
MAX_JSON_BYTES = 4 << 20
MAX_SHARDS = 1000

#: Keys of any JSON file that make transformers load code, or weights of another kind than plain ones.
_CODE_KEYS = frozenset(
    {
        "auto_map", "trust_remote_code", "custom_pipelines", "custom_generate", "custom_object_save", "code_revision",
        "kernel_config", "use_kernels", "attn_implementation", "_attn_implementation", "_experts_implementation",
        "experts_implementation",
    }
)  # fmt: skip
#: What `auto_map` may say in a bundle of ours.
_OWN_CLASSES = [family.auto_map for family in FAMILIES.values() if family.auto_map]
_OTHER_WEIGHTS = frozenset({"quantization_config", "compression_config"})

CLASS_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_POINTER = b"version https://git-lfs.github.com/"
_LICENCE = re.compile(r"^license:\s*['\"]?([A-Za-z0-9.+-]{1,64})['\"]?\s*$", re.MULTILINE)


_PICKLE = (
    "pytorch_model.bin is a pickle, and none is opened: make a model.safetensors of it, docs/generative.md has the line"
)


class Refused(ValueError):
    """The folder is not offered. code: why, in a fixed word; the text is for the operator."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Reader:
    """Files of one folder: by exact names, of bounded size, never from outside `root`. own: a bundle that this service
    has made."""

    def __init__(self, folder: Path, root: Path, *, own: bool = False) -> None:
        self._folder, self._root, self._own = folder, root, own
        if not folder.resolve().is_relative_to(self._root):
            raise Refused("outside_folder", "a link leads out of the folder of models")
        for number, _ in enumerate(folder.iterdir()):
            if number >= MAX_ENTRIES:
                raise Refused("too_many_files", f"more than {MAX_ENTRIES} entries")

    def find(self, name: str) -> Path | None:
        path = (self._folder / name).resolve()
        if not path.is_file():
            return None
        if not path.is_relative_to(self._root):
            raise Refused("outside_folder", f"{name} is a link that leads out of the folder of models")
        return path

    def content(self, name: str, limit: int) -> bytes | None:
        path = self.find(name)
        if path is None:
            return None
        with path.open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise Refused("file_too_large", f"{name} has more than {limit} bytes")
        if content.startswith(_POINTER):
            raise Refused("git_lfs_pointer", f"{name} is a pointer of Git LFS, not the file: `git lfs pull` fetches it")
        return content

    def json(self, name: str) -> dict[str, Any] | None:
        content = self.content(name, MAX_JSON_BYTES)
        if content is None:
            return None
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Refused("invalid_json", f"{name} is not JSON") from error
        if not isinstance(value, dict):
            raise Refused("invalid_json", f"{name} is not a JSON object")
        for key in keys_of_code(value, own=self._own):
            raise Refused("code_in_config", f"{name} has the key {key}: models with code of their own are not run")
        if _OTHER_WEIGHTS & value.keys():
            raise Refused("quantized", f"{name}: the weights are quantized, which cannot be fine-tuned here")
        return value

    def rewritten(self, name: str, keys: frozenset[str]) -> dict[str, bytes]:
        """The file with only these keys; {} without the file."""
        value = self.json(name)
        if value is None:
            return {}
        for key in ("tokenizer_class", "image_processor_type", "feature_extractor_type"):
            if value.get(key) is not None and not CLASS_NAME.fullmatch(str(value[key])):
                raise Refused("code_in_config", f"{name} names a class that is not transformers' own")
        return {name: dumped(only(value, keys))}

    def plain(self) -> dict[str, bytes]:
        found = {name: self.content(name, limit) for name, limit in PLAIN_FILES.items()}
        return {name: content for name, content in found.items() if content is not None}

    def weights(self) -> dict[str, Path]:
        """The weights' files by name, the index of several among them."""
        single = self.find(WEIGHTS)
        if single is not None:
            if single.stat().st_size < 1024:
                self.content(WEIGHTS, 1024)
            return {WEIGHTS: single}
        index = self.json(INDEX)
        if index is None:
            other = self.find("pytorch_model.bin") or self.find("pytorch_model.bin.index.json")
            raise Refused("no_safetensors", _PICKLE if other else "there is no model.safetensors, which alone is read")
        names = index.get("weight_map")
        if not isinstance(names, dict) or not all(_SHARD.fullmatch(str(name)) for name in names.values()):
            raise Refused("invalid_weights", f"{INDEX} is not of its form")
        shards = sorted(set(names.values()))
        if len(shards) > MAX_SHARDS:
            raise Refused("invalid_weights", f"more than {MAX_SHARDS} files of weights")
        found = {name: self.find(name) for name in (INDEX, *shards)}
        missing = [name for name, path in found.items() if path is None]
        if missing:
            raise Refused("invalid_weights", f"{missing[0]} is missing")
        return {name: path for name, path in found.items() if path is not None}

    def licence(self) -> str:
        """Of the model card's metadata block, cut to what a block may have."""
        path = self.find("README.md")
        if path is None:
            return "unknown"
        with path.open("rb") as file:
            text = file.read(64 << 10).decode("utf-8", errors="replace")
        block = text.split("\n---", 1)[0] if text.startswith("---") else ""
        found = _LICENCE.search(block)
        return found[1].lower() if found else "unknown"


def keys_of_code(value: Mapping[str, Any], *, own: bool) -> list[str]:
    """Keys by which a JSON file of a model has transformers load code, or choose how it runs. own: of a bundle of ours,
    which may name the file that it brings for others; here that is never run, either."""
    said = sorted(key for key in _CODE_KEYS & value.keys() if value[key] not in (None, False, {}, []))
    return [key for key in said if not (own and key == "auto_map" and value[key] in _OWN_CLASSES)]


def only(value: Mapping[str, Any], keys: frozenset[str]) -> dict[str, Any]:
    return {key: inner for key, inner in value.items() if key in keys}


def dumped(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True).encode()
