"""An operator's folder of models: what is offered of it, and every way in which it is not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from app.catalog.bases import BASES, BaseModel
from app.catalog.families import FAMILIES
from app.models import catalog, digests, discovery, model_folder
from app.models.folder_reader import Refused
from app.models.model_folder import inspect
from app.models.weights import InvalidWeights, read_header
from app.settings import Settings
from tests.app.models.folders import CONFIG, SHAPES, framed, make_folder, safetensors

#: Its weights end with the body, as `AutoModel.save_pretrained` leaves them.
LLAMA: dict[str, Any] = {**CONFIG, "model_type": "llama", "architectures": ["LlamaModel"]}


def refused(folder: Path, root: Path | None = None) -> str:
    with pytest.raises(Refused) as caught:
        inspect(folder, root or folder.parent, "mine")
    return caught.value.code


def test_its_facts_come_from_config_and_header(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "mine", modules__json=[], chat_template__jinja="{{ messages }}")
    base = inspect(folder, tmp_path, "mine").base
    assert (base.family, base.hidden_size, base.num_layers, base.max_length) == ("bert", 8, 2, 34)
    assert base.parameters == 20 * 8 + 34 * 8 + 2 * (8 * 16 + 8)
    assert (base.layer_parameters, base.bias_parameters) == (8 * 16 + 8, 16)
    assert (base.licence, base.title, base.source) == ("mit", "BertModel, 2 layers", "folder")
    assert "text_classification" in base.tasks
    assert base.sentence_encoder
    assert base.chat_template


def test_a_trainer_gets_rewritten_files_and_nothing_else(tmp_path: Path) -> None:
    folder = make_folder(
        tmp_path / "mine",
        pytorch_model__bin=b"\x80\x04pickle",
        modeling_mine__py="print('run')",
        generation_config__json={"eos_token_id": 3, "custom_generate": None, "cache_implementation": "org/code"},
    )
    found = inspect(folder, tmp_path, "mine")
    assert set(found.small) == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    config = json.loads(found.small["config.json"])
    assert config == {key: CONFIG[key] for key in CONFIG if key not in ("_name_or_path", "gradient_checkpointing")}
    assert json.loads(found.small["tokenizer_config.json"]).keys() == {"tokenizer_class", "do_lower_case"}
    assert json.loads(found.small["generation_config.json"]) == {"eos_token_id": 3}
    assert found.weights == {"model.safetensors": folder / "model.safetensors"}


def test_weights_may_lie_in_several_files(tmp_path: Path) -> None:
    parts = [dict(list(SHAPES.items())[:2]), dict(list(SHAPES.items())[2:])]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}}
    files: dict[str, Any] = {name: safetensors(part) for name, part in zip(names, parts, strict=True)}
    folder = make_folder(tmp_path / "mine", model__safetensors=None, **files, **{"model.safetensors.index.json": index})
    whole = inspect(make_folder(tmp_path / "whole"), tmp_path, "whole")
    found = inspect(folder, tmp_path, "mine")
    assert found.base.parameters == whole.base.parameters
    assert set(found.weights) == set(names)
    lines = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in names)
    assert found.digest(digests.sha256) == hashlib.sha256(lines.encode()).hexdigest()
    assert json.loads(found.small["model.safetensors.index.json"]) == index

    index["weight_map"]["another"] = names[0]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(folder) == "invalid_weights"
    (folder / names[1]).unlink()
    assert refused(folder) == "invalid_weights"
    index["weight_map"] = {"x": "../../model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(folder) == "invalid_weights"


HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "a pickle alone": ("no_safetensors", {"model__safetensors": None, "pytorch_model__bin": b"\x80\x04"}),
    "code of its own": ("code_in_config", {"config__json": {**CONFIG, "auto_map": {"AutoModel": "modeling.Mine"}}}),
    "remote code asked for": ("code_in_config", {"config__json": {**CONFIG, "trust_remote_code": True}}),
    "a kernel of a hub": ("code_in_config", {"config__json": {**CONFIG, "_attn_implementation": "org/kernel"}}),
    "a tokenizer of its own": (
        "code_in_config",
        {"tokenizer_config__json": {"auto_map": {"AutoTokenizer": ["org/repo--tok.Mine", None]}}},
    ),
    "a remote tokenizer class": ("code_in_config", {"tokenizer_config__json": {"tokenizer_class": "org/repo--t.Mine"}}),
    "a module's class": ("code_in_config", {"preprocessor_config__json": {"image_processor_type": "os.system"}}),
    "quantized": ("quantized", {"config__json": {**CONFIG, "quantization_config": {"bits": 4}}}),
    "integers for weights": ("quantized", {"model__safetensors": safetensors(SHAPES, "I8", 1)}),
    "another architecture": ("unknown_family", {"config__json": {**CONFIG, "model_type": "mamba"}}),
    **{
        kind: ("unknown_family", {"config__json": {**CONFIG, "model_type": kind}})
        for kind in ("gemma3_text", "phi3", "mistral", "nllb-moe", "electra")
    },
    "relative positions": ("unknown_family", {"config__json": {**CONFIG, "position_embedding_type": "relative_key"}}),
    "no architecture": ("unknown_family", {"config__json": {}}),
    "a list for a config": ("invalid_json", {"config__json": [1]}),
    "a deep config": ("invalid_json", {"config__json": "[" * 200_000}),
    "a deep config inside": ("absurd_config", {"config__json": {**CONFIG, "x": [[[[[[[1]]]]]]]}}),
    "a long config": ("file_too_large", {"config__json": " " * (5 << 20) + "{}"}),
    "absurd width": ("absurd_config", {"config__json": {**CONFIG, "hidden_size": 10**9}}),
    "absurd feed-forward width": ("absurd_config", {"config__json": {**CONFIG, "intermediate_size": 10**15}}),
    "no width": ("absurd_config", {"config__json": {**CONFIG, "hidden_size": None}}),
    "negative depth": ("absurd_config", {"config__json": {**CONFIG, "num_hidden_layers": -1}}),
    "true as a depth": ("absurd_config", {"config__json": {**CONFIG, "num_hidden_layers": True}}),
    "another vocabulary": ("config_mismatch", {"config__json": {**CONFIG, "vocab_size": 2_000_000_000}}),
    "other positions": ("config_mismatch", {"config__json": {**CONFIG, "max_position_embeddings": 9_000_000}}),
    "more layers than weights": ("config_mismatch", {"config__json": {**CONFIG, "num_hidden_layers": 900}}),
    "no head of its own": ("no_head", {"config__json": LLAMA}),
    "no tokenizer": ("no_tokenizer", {"tokenizer__json": None}),
    "a long chat template": ("file_too_large", {"chat_template__jinja": "x" * 70_000}),
    "text for weights": ("invalid_weights", {"model__safetensors": b"not tensors at all"}),
    "no weights in the file": ("invalid_weights", {"model__safetensors": framed(b"{}", b"")}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_folder_is_refused_with_its_reason(what: str, tmp_path: Path) -> None:
    code, files = HOSTILE[what]
    assert refused(make_folder(tmp_path / "mine", **files)) == code


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_stay_inside(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    folder = make_folder(tmp_path / "models" / "mine")
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    assert refused(folder, tmp_path / "models") == "outside_folder"
    inside = tmp_path / "models" / ".blobs"
    outside.rename(inside)
    (folder / name).unlink()
    (folder / name).symlink_to(inside)
    assert inspect(folder, tmp_path / "models", "mine").base.hidden_size == 8


def test_a_linked_folder_stays_inside_too(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(make_folder(tmp_path / "elsewhere"))
    assert refused(tmp_path / "models" / "mine", tmp_path / "models") == "outside_folder"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        (2**63).to_bytes(8, "little") + b"{}",  # a header of exabytes
        (9 << 20).to_bytes(8, "little") + b" " * (9 << 20),  # and one that is there, but too long
        framed(b"[" * 100_000, b""),
        framed(b'{"a":1}', b""),
        framed(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', bytes(8)),
        framed(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(9)),
        framed(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', bytes(16)),
        framed(b'{"a":{"dtype":"F32","shape":[1099511627775,1099511627775],"data_offsets":[0,8]}}', bytes(8)),
        framed(b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,-8]}}', b""),
        framed(b'{"a":{"dtype":"PICKLE","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        framed(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
            bytes(12),
        ),
    ],
)
def test_a_header_is_not_trusted(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InvalidWeights):
        read_header(tmp_path / "x")


def test_a_scan_finds_folders_and_says_what_it_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "one")
    make_folder(tmp_path / "org" / "two")
    make_folder(tmp_path / ".hidden")
    make_folder(tmp_path / "name with spaces")
    make_folder(tmp_path / "deep" / "er" / "still")
    make_folder(tmp_path / "all-MiniLM-L6-v2")
    make_folder(tmp_path / "ft-mine")
    make_folder(tmp_path / "bad", model__safetensors=None)
    (tmp_path / "file").write_text("x")
    found = discovery.scan(tmp_path)
    assert list(found.models) == ["one", "org/two"]
    codes = {name: reason.code for name, reason in found.refused.items()}
    assert codes == {"all-MiniLM-L6-v2": "name_taken", "bad": "no_safetensors", "ft-mine": "name_taken"}
    assert discovery.scan(tmp_path / "nowhere").models == {}


def test_a_changed_model_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, data = tmp_path / "models", tmp_path / "data"
    folder = make_folder(models / "one")
    looked: list[Path] = []
    real = model_folder.inspect
    monkeypatch.setattr(model_folder, "inspect", lambda f, *rest: looked.append(f) or real(f, *rest))
    first, again = discovery.scan(models).models["one"], discovery.scan(models).models["one"]
    assert first is again
    assert looked == [folder]
    before = discovery.base_of(first, data).digest
    assert before == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "model.safetensors").write_bytes(safetensors(SHAPES, "F64", 8))
    after = discovery.base_of(discovery.scan(models).models["one"], data).digest
    assert after == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "model.safetensors").unlink()
    assert discovery.scan(models).refused["one"].code == "no_safetensors"


def test_a_head_is_there_or_tied(tmp_path: Path) -> None:
    for number, (config, shapes) in enumerate(
        (
            ({**LLAMA, "tie_word_embeddings": True}, SHAPES),
            (LLAMA, {**SHAPES, "lm_head.weight": (20, 8)}),
        )
    ):
        folder = make_folder(tmp_path / str(number), config__json=config, model__safetensors=safetensors(shapes))
        assert "language_modeling" in inspect(folder, tmp_path, "mine").base.tasks


def test_a_masked_language_model_needs_its_head(tmp_path: Path) -> None:
    """Whatever its config says of its architecture."""
    config = {**CONFIG, "architectures": ["BertForMaskedLM"]}
    bare = make_folder(tmp_path / "bare", config__json=config)
    head = {"cls.predictions.transform.dense.weight": (8, 8)}
    whole = make_folder(tmp_path / "whole", config__json=config, model__safetensors=safetensors({**SHAPES, **head}))
    assert "masked_lm" not in inspect(bare, tmp_path, "bare").base.tasks
    assert "masked_lm" in inspect(whole, tmp_path, "whole").base.tasks


def test_weights_are_hashed_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    digest = digests.sha256(file, tmp_path / "data")
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert digests.sha256(file, tmp_path / "data") == digest == hashlib.sha256(b"one").hexdigest()
    monkeypatch.undo()
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert digests.sha256(file, tmp_path / "data") == hashlib.sha256(b"two").hexdigest()
    os.replace(shutil.copy2(file, tmp_path / "copy"), file)  # of the same size and time, but another file
    with pytest.raises(digests.Unknown):
        digests.known(file, tmp_path / "data")
    (tmp_path / "data" / "model_digests.json").write_text("broken")
    assert digests.sha256(file, tmp_path / "data") == hashlib.sha256(b"two").hexdigest()


def test_a_base_survives_storage() -> None:
    base = BASES["all-MiniLM-L6-v2"]
    stored = json.loads(json.dumps(base.to_dict()))
    assert BaseModel.from_dict(stored).to_dict() == base.to_dict()
    assert "path" not in stored


def test_a_refused_folder_says_why_to_who_asks_for_it(settings: Settings, tmp_path: Path) -> None:
    make_folder(tmp_path / "models" / "bad", model__safetensors=None)
    mine = settings.model_copy(update={"models_dir": tmp_path / "models"})
    with pytest.raises(catalog.InvalidRequest) as caught:
        catalog.find_base(mine, "bad")
    assert (caught.value.code, caught.value.extra) == ("base_model_refused", {"reason": "no_safetensors"})
    assert catalog.find_base(mine, "none") is None
    assert list(catalog.refused(mine)) == ["bad"]


@pytest.mark.parametrize("family", ["resnet", "bit", "convnext"])
def test_the_blocks_of_a_network_in_stages_are_counted_in_all_of_them(tmp_path: Path, family: str) -> None:
    config = {"model_type": family, "hidden_sizes": [8, 16], "depths": [3, 2], "architectures": ["ForImages"]}
    blocks = [f"{family}.encoder.stages.{stage}.layers.{n}." for stage, depth in ((0, 3), (1, 2)) for n in range(depth)]
    shapes = {f"{block}conv.weight": (8, 8, 3, 3) for block in blocks}
    shapes[f"{family}.encoder.stages.1.downsampling_layer.0.weight"] = (16, 8)
    files = {"config__json": config, "model__safetensors": safetensors(shapes)}
    assert refused(make_folder(tmp_path / "bare", **files)) == "no_image_processor"
    old = {"feature_extractor_type": "DeiTFeatureExtractor", "size": 36, "auto_size": 3}
    folder = make_folder(tmp_path / "m", **files, preprocessor_config__json=old)
    told = json.loads(inspect(folder, tmp_path, "m").small["preprocessor_config.json"])
    assert told == {"image_processor_type": "DeiTImageProcessor", "size": 36}  # never a default of another's
    base = inspect(folder, tmp_path, "m").base
    assert (base.num_layers, base.layer_parameters, base.hidden_size) == (5, 8 * 8 * 9, 16)
    fewer = {name: shape for name, shape in shapes.items() if ".1.layers.1." not in name}
    (folder / "model.safetensors").write_bytes(safetensors(fewer))
    with pytest.raises(Refused, match="fewer layers"):
        inspect(folder, tmp_path, "m")


def test_classes_that_a_bundle_of_ours_brings_are_read_and_never_run(tmp_path: Path) -> None:
    """The same folder in an operator's hands is a foreign one; without the code this service knows it, too."""
    config = {
        "model_type": "resnet_group_norm",
        "hidden_sizes": [8],
        "depths": [1],
        "group_norm_layers": ["resnet.encoder.stages.0.layers.0.normalization"],
        "privtune": {"task": "image_classification"},
        "auto_map": dict(FAMILIES["resnet_group_norm"].auto_map),
    }
    weights = safetensors({"resnet.encoder.stages.0.layers.0.normalization.weight": (8,)})
    files = {"config__json": config, "model__safetensors": weights, "modeling_group_norm__py": "raise SystemExit"}
    files |= {"preprocessor_config__json": {"size": 32}}
    folder = make_folder(tmp_path / "mine", **files)
    assert refused(folder) == "code_in_config"
    found = inspect(folder, tmp_path, "ft-mine", "fine_tuned")
    assert (found.base.family, found.base.trained_for) == ("resnet_group_norm", "image_classification")
    small = json.loads(found.small["config.json"])
    assert small["group_norm_layers"] == config["group_norm_layers"]
    assert "auto_map" not in small
    assert not [name for name in (*found.small, *found.weights) if name.endswith(".py")]
    for auto_map in ({**config["auto_map"], "AutoModel": "x.Y"}, {"AutoConfig": "org/repo--x.Y"}, ["x.Y"]):
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
        with pytest.raises(Refused) as caught:
            inspect(folder, tmp_path, "ft-mine", "fine_tuned")
        assert caught.value.code == "code_in_config"
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": None}))
    assert inspect(folder, tmp_path, "mine").base.family == "resnet_group_norm"
