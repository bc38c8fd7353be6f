"""A folder of a Hugging Face model, looked at without torch: what it is, and what of it a trainer may read.

The trainer never reads such a folder itself. It gets a copy of the small files, rewritten from allow lists, and the
weights, safetensors only: no pickle is opened, no key that names code is passed on, no file outside the folder is
reached. (A chat template is a program too: transformers renders it in jinja2's ImmutableSandboxedEnvironment.)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.catalog.bases import BaseModel, Source
from app.catalog.families import COMMON_KEYS, FAMILIES, Family
from app.catalog.tasks import TASKS
from app.models import language_tokens, plain_vocabulary, token_ids, tokenizer_files
from app.models.folder_reader import (
    CLASS_NAME,
    CONFIG,
    INDEX,
    PLAIN_FILES,
    TOKENIZER,
    WEIGHTS,
    Reader,
    Refused,
    dumped,
    only,
)
from app.models.weights import InvalidWeights, TensorInfo, read_header

#: The key of config.json in which the trainer notes what it made of a model, see its `families.loading`.
MARKER = "privtune"


#: All that a trainer may read of a bundle of ours.
READABLE = frozenset(
    {
        CONFIG, WEIGHTS, *PLAIN_FILES, *tokenizer_files.SENTENCEPIECE_FILES, "tokenizer_config.json",
        "special_tokens_map.json", token_ids.ADDED_TOKENS, "generation_config.json", "preprocessor_config.json",
    }
)  # fmt: skip

_PROCESSOR = "preprocessor_config.json"
_MAX_SIZES = {"hidden_size": 65_536, "num_layers": 1024, "max_length": 10_000_000}
_MAX_INTEGER = 1 << 31

_TOKENIZER_KEYS = frozenset(
    {
        "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens",
        "backend", "bos_token", "chat_template", "clean_up_tokenization_spaces", "cls_token", "do_basic_tokenize",
        "do_lower_case", "eos_token", "errors", "extra_ids", "extra_special_tokens", "language_codes", "legacy",
        "legacy_behaviour", "lowercase", "num_madeup_words",
        "mask_token", "model_input_names", "model_max_length", "never_split", "pad_token", "padding_side", "sep_token",
        "separate_vocabs", "source_lang", "spaces_between_special_tokens", "split_special_tokens", "src_lang",
        "strip_accents", "target_lang", "tgt_lang", "tokenize_chinese_chars", "tokenizer_class", "trim_offsets",
        "truncation_side", "unk_token", "use_default_system_prompt",
    }
)  # fmt: skip
_SPECIAL_TOKENS = frozenset(
    {
        "additional_special_tokens", "bos_token", "cls_token", "eos_token", "extra_special_tokens", "mask_token",
        "pad_token", "sep_token", "unk_token",
    }
)  # fmt: skip
_GENERATION_KEYS = frozenset(
    {
        "bad_words_ids", "bos_token_id", "decoder_start_token_id", "do_sample", "early_stopping", "eos_token_id",
        "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length",
        "no_repeat_ngram_size", "num_beams", "pad_token_id",
        "renormalize_logits", "repetition_penalty", "temperature", "top_k", "top_p", "transformers_version",
    }
)  # fmt: skip
_PROCESSOR_KEYS = frozenset(
    {
        "crop_pct", "crop_size", "data_format", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale",
        "do_resize", "image_mean", "image_processor_type", "image_std", "include_top", "resample", "rescale_factor",
        "rescale_offset", "size",
    }
)  # fmt: skip

#: BERT's first files call the bias of a norm beta.
_BIAS = (".bias", ".LayerNorm.beta")
_BLOCK = re.compile(r"^(.*?\.)?(?:layers?|h|blocks?)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """base: its facts, but for `digest` while nobody hashed the weights. small: name → content, all that a trainer
    reads beside the weights. weights: name → the file itself."""

    base: BaseModel
    small: Mapping[str, bytes]
    weights: Mapping[str, Path]

    def digest(self, sha256: Callable[[Path], str]) -> str:
        """Of the weights: the file's own SHA-256, or that of the `sha256sum` listing of several files."""
        digests = {name: sha256(path) for name, path in self.weights.items()}
        return digests[WEIGHTS] if WEIGHTS in digests else _listing(digests)


def inspect(folder: Path, root: Path, base_id: str, source: Source = "folder") -> ModelFolder:
    """What `folder` holds. root: nothing outside of it is read, whatever links say. Raises Refused, and OSError."""
    reader = Reader(folder, root.resolve(), own=source == "fine_tuned")
    config = reader.json(CONFIG)
    if config is None:
        raise Refused("no_config", "there is no config.json")
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise Refused("unknown_family", f"model_type is none of {', '.join(FAMILIES)}")
    if config.get("position_embedding_type") not in (None, "absolute"):
        raise Refused("unknown_family", "transformers has no relative positions for this architecture any more")
    sizes = _sizes(config, family)
    weights = reader.weights()
    tensors = _tensors(reader, weights, family)
    _check_shapes(config, family, sizes, tensors)
    small = {
        CONFIG: dumped(only(_checked(config), COMMON_KEYS | family.keys)),
        **reader.rewritten("tokenizer_config.json", _TOKENIZER_KEYS),
        **reader.rewritten("special_tokens_map.json", _SPECIAL_TOKENS),
        **reader.rewritten("generation_config.json", _GENERATION_KEYS),
        **_image_processor(reader),
        **reader.plain(),
    }
    if family.kind == "seq2seq" and "generation_config.json" not in small:
        small["generation_config.json"] = dumped(only(config, _GENERATION_KEYS))  # where older models keep it
    if INDEX in weights:
        small[INDEX] = weights.pop(INDEX).read_bytes()
    if family.kind == "image" and _PROCESSOR not in small:
        raise Refused("no_image_processor", f"there is no {_PROCESSOR}")
    languages: tuple[str, ...] = ()
    if family.kind != "image":
        languages = _tokenizer(reader, family, config, small)
    noted = config.get(MARKER)
    marker: Mapping[str, Any] = noted if isinstance(noted, dict) else {}
    tasks = tuple(name for name in family.tasks if _has_head(name, config, family, tensors))
    if not tasks:
        raise Refused("no_head", f"the weights have no {family.head}, and config.json does not tie it to the embedding")
    template = "chat_template.jinja" in small or b'"chat_template"' in small.get("tokenizer_config.json", b"")
    pools = bool(marker.get("pooling_layer"))
    repeated = _repeated(config, family, tensors)
    counted = {
        name: tensor for name, tensor in tensors.items() if name not in repeated and not name.endswith(family.fixed)
    }
    base = BaseModel(
        id=base_id,
        title=_title(config, family, sizes["num_layers"] - pools),
        family=family.model_type,
        tasks=tasks,
        parameters=sum(tensor.size for tensor in counted.values()),
        layer_parameters=_layer_parameters(tensors),
        bias_parameters=sum(tensor.size for name, tensor in counted.items() if name.endswith(_BIAS)),
        hidden_size=sizes["hidden_size"],
        num_layers=sizes["num_layers"] - pools,
        max_length=sizes["max_length"] - family.position_offset,
        licence=reader.licence(),
        digest="",
        source=source,
        files_digest=_listing({name: hashlib.sha256(content).hexdigest() for name, content in small.items()}),
        sentence_encoder=family.kind == "encoder" and reader.find("modules.json") is not None,
        chat_template=template,
        trained_for=str(marker.get("task", "")),
        labels=_labels(config) if marker.get("task") else (),
        pools=pools,
        languages=languages,
        language_pair=tokenizer_files.language_pair(small) if family.model_type == "marian" else (),
        parameter_names=tuple(tensors),
        path=str(folder),
    )
    return ModelFolder(base, small, weights)


def _tokenizer(reader: Reader, family: Family, config: Mapping[str, Any], small: dict[str, bytes]) -> tuple[str, ...]:
    """Adds what the tokenizer is made from beside `small`. The languages that a translation can be told; of a model
    that reads and writes. Raises Refused where it is none, or gives ids that the weights have no rows for."""
    small |= token_ids.added_tokens(reader, small)
    languages: tuple[str, ...] = ()
    more: Iterable[str] = ()
    if family.language_tokens:
        found, languages, ids, more = language_tokens.read(reader, family, config, small)
    elif TOKENIZER not in small and plain_vocabulary.is_enough(family):
        found = {}
        ids, more = plain_vocabulary.read(family, config, small)
    else:
        found, ids = tokenizer_files.sentencepiece(reader, family, config, small)
        languages = tokenizer_files.languages(small) if family.kind == "seq2seq" else ()
    small |= found
    if not ids and TOKENIZER in small:
        ids = token_ids.of_tokenizer_json(small[TOKENIZER])
    if ids:
        token_ids.check(ids, small, config["vocab_size"], more)
    return languages


def _image_processor(reader: Reader) -> dict[str, bytes]:
    """What older files call a feature extractor is the image processor of today."""
    found = reader.rewritten(_PROCESSOR, _PROCESSOR_KEYS | {"feature_extractor_type"})
    if not found:
        return {}
    said = json.loads(found[_PROCESSOR])
    old = said.pop("feature_extractor_type", None)
    if name := said.get("image_processor_type") or old:
        said["image_processor_type"] = re.sub("FeatureExtractor$", "ImageProcessor", str(name))
    return {_PROCESSOR: dumped(said)}


def _has_head(task: str, config: Mapping[str, Any], family: Family, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the weights hold the head that the task trains, which is never made anew for these tasks; an encoder
    often comes without the one that it was pretrained with."""
    if TASKS[task].head != "pretrained":
        return True
    if family.kind != "encoder" and config.get("tie_word_embeddings", family.tied):
        return True
    return family.head in tensors


def _sizes(config: Mapping[str, Any], family: Family) -> dict[str, int]:
    keys = {"hidden_size": family.hidden_size, "num_layers": family.num_layers, "max_length": family.max_length}
    sizes = {}
    for what, key in keys.items():
        value = config.get(key) if key else family.unlimited
        if isinstance(value, list) and value and all(type(each) is int for each in value):
            value = value[-1] if what == "hidden_size" else sum(value)  # stages of a convolutional network
        if type(value) is not int or not 1 <= value <= _MAX_SIZES[what]:
            raise Refused("absurd_config", f"{key} is missing or out of its range")
        sizes[what] = value
    return sizes


def _tensors(reader: Reader, weights: Mapping[str, Path], family: Family) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    index = reader.json(INDEX) if INDEX in weights else None
    for name, path in weights.items():
        if name == INDEX:
            continue
        try:
            header = read_header(path)
        except InvalidWeights as error:
            raise Refused("invalid_weights", f"{name}: {error}") from error
        if index is not None and header.keys() != {key for key, file in index["weight_map"].items() if file == name}:
            raise Refused("invalid_weights", f"{name} holds other tensors than {INDEX} says")
        tensors |= header
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    learnt = [tensor for name, tensor in tensors.items() if tensor.size > 1 and not name.endswith(family.fixed)]
    if not all(tensor.dtype in ("F64", "F32", "F16", "BF16") for tensor in learnt):
        raise Refused("quantized", "the weights are not floating-point numbers")
    return tensors


def _repeated(config: Mapping[str, Any], family: Family, tensors: Mapping[str, TensorInfo]) -> set[str]:
    """Tensors that stand for another one once more: an embedding that the model has in several places, and a head that
    is tied to it, with its bias. (What is tied and yet different, transformers takes apart.) Raises OSError."""
    seen: set[tuple[Any, ...]] = set()
    repeated = set()
    sizes = {config.get("vocab_size"), tokenizer_files.written_size(config)}
    untied = family.kind != "encoder" and not config.get("tie_word_embeddings", family.tied)
    for name, tensor in tensors.items():
        if not tensor.shape or tensor.shape[0] not in sizes or (untied and name.endswith(family.head)):
            continue
        if len(tensor.shape) == 2 or name.endswith(_BIAS):
            content = (tensor.dtype, tensor.shape, *tensor.ends())
            if content in seen:
                repeated.add(name)
            seen.add(content)
    return repeated


def _check_shapes(
    config: Mapping[str, Any], family: Family, sizes: Mapping[str, int], tensors: Mapping[str, TensorInfo]
) -> None:
    """What the config says is what the weights are: a trainer allocates by the config."""
    shapes = {tensor.shape for tensor in tensors.values()}
    if family.kind != "image" and (config.get("vocab_size"), sizes["hidden_size"]) not in shapes:
        raise Refused("config_mismatch", "no weight has the vocabulary's size by the hidden size")
    if family.kind == "seq2seq" and (tokenizer_files.written_size(config), sizes["hidden_size"]) not in shapes:
        raise Refused("config_mismatch", "no weight has the size of the vocabulary that is written by the hidden size")
    if family.position_table and (sizes["max_length"] + family.extra_positions, sizes["hidden_size"]) not in shapes:
        raise Refused("config_mismatch", "no weight has the number of positions by the hidden size")
    if len(_blocks(tensors)) < sizes["num_layers"]:
        raise Refused("config_mismatch", "the weights have fewer layers than the config says")


def _blocks(tensors: Mapping[str, TensorInfo]) -> dict[tuple[str, str], int]:
    """(prefix, index) of every block → numbers in it."""
    blocks: dict[tuple[str, str], int] = {}
    for name, tensor in tensors.items():
        if found := _BLOCK.match(name):
            place = (found[1] or "", found[2])
            blocks[place] = blocks.get(place, 0) + tensor.size
    return blocks


def _layer_parameters(tensors: Mapping[str, TensorInfo]) -> int:
    blocks = _blocks(tensors)
    return round(sum(blocks.values()) / len(blocks)) if blocks else 0


def _checked(value: Any, depth: int = 0) -> Any:
    """The same JSON value. Raises Refused where numbers, nesting or lengths are absurd."""
    match value:
        case None | bool() | float():
            pass
        case int() if abs(value) <= _MAX_INTEGER:
            pass
        case str() if len(value) <= 4096:
            pass
        case list() if len(value) <= 10_000 and depth < 6:
            for each in value:
                _checked(each, depth + 1)
        case dict() if len(value) <= 10_000 and depth < 6:
            for each in value.values():
                _checked(each, depth + 1)
        case _:
            raise Refused("absurd_config", "config.json has a number, a text or a list that no model has")
    return value


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes of the head, in the order of its outputs."""
    names = config.get("id2label")
    if not isinstance(names, dict):
        return ()
    return tuple(str(names.get(str(index), "")) for index in range(len(names)))


def _title(config: Mapping[str, Any], family: Family, layers: int) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else family.model_type
    return f"{name if CLASS_NAME.fullmatch(str(name)) else family.model_type}, {layers} layers"


def _listing(digests: Mapping[str, str]) -> str:
    """SHA-256 of what `sha256sum` prints, by name."""
    return hashlib.sha256("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()).hexdigest()
