"""What the catalog offers, the trainer can do; what it says of a base model is what the package holds."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoConfig
from transformers.models.m2m_100 import tokenization_m2m_100
from transformers.models.mbart50 import tokenization_mbart50

from app.catalog import languages
from app.catalog.adaptations import ADAPTATIONS, OF_PHASES, adaptation_from_dict, adaptation_to_dict
from app.catalog.bases import BASES, BaseModel
from app.catalog.exports import EXPORT_FORMATS
from app.catalog.families import COMMON_KEYS, FAMILIES, Family
from app.catalog.tasks import TASKS
from app.exports.lifecycle import FAILURES as EXPORT_FAILURES
from app.exports.schemas import FormatName
from app.jobs.schemas import TaskBlock
from worker.exporter.formats.registry import MAKERS
from worker.exporter.spec import FAILURES as EXPORTER_FAILURES
from worker.metrics_gate import METRICS
from worker.trainer.adaptations.registry import ADAPTERS
from worker.trainer.families.interface import PooledFamily
from worker.trainer.families.registry import FAMILIES as ARCHITECTURES
from worker.trainer.families.registry import family_for
from worker.trainer.tasks.registry import TRAINER_TASKS


def test_every_task_has_its_trainer() -> None:
    assert TRAINER_TASKS.keys() == TASKS.keys()
    assert [name for name, task in TASKS.items() if task.type != name] == []


def test_every_pair_of_family_and_task_has_its_architecture() -> None:
    pairs = [(family.model_type, task) for family in FAMILIES.values() for task in family.tasks]
    assert all(family_for(*pair) for pair in pairs)
    offered = {(model_type, TASKS[task].model) for model_type, task in pairs}
    assert offered == {(model_type, model) for model_type, models in ARCHITECTURES.items() for model in models}
    for family in FAMILIES.values():
        for task in family.tasks:
            architecture = family_for(family.model_type, task)
            assert (TASKS[task].head == "pooled") == isinstance(architecture, PooledFamily)
            assert family.centred == getattr(architecture, "centres", False) or TASKS[task].head != "pooled"


def test_what_a_task_releases_the_gate_knows() -> None:
    assert METRICS.keys() == TASKS.keys()
    assert {name for task in TASKS.values() for name in task.options} <= set(TaskBlock.model_fields)


def test_every_adaptation_has_its_adapter() -> None:
    assert ADAPTERS.keys() == OF_PHASES.keys() > ADAPTATIONS.keys()


def test_every_export_format_can_be_asked_for_and_made() -> None:
    assert MAKERS.keys() == EXPORT_FORMATS.keys() == {*get_args(FormatName)}


def test_every_failure_of_the_exporter_is_told_in_its_words() -> None:
    assert {code: EXPORT_FAILURES.get(code) for code in EXPORTER_FAILURES} == EXPORTER_FAILURES


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_an_adaptation_survives_storage(name: str) -> None:
    adaptation = ADAPTATIONS[name]()
    assert adaptation.type == name
    stored = json.loads(json.dumps(adaptation_to_dict(adaptation)))
    assert adaptation_from_dict(stored) == adaptation


def test_roles_of_a_task_are_inferred_from_distinct_names() -> None:
    for task in TASKS.values():
        names = [name for column in task.columns for name in column.names]
        assert len(set(names)) == len(names), "one column name would stand for two roles"
        assert [name for name in names if name != name.lower()] == []


@pytest.mark.parametrize("base", [base for base in BASES.values() if not base.conversion], ids=str)
def test_a_base_is_what_the_catalog_says(base: BaseModel) -> None:
    assert base.family in FAMILIES
    assert set(base.tasks) <= TASKS.keys()
    found = importlib.util.find_spec(base.package)
    assert found is not None
    assert found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0]) / base.path
    weights = folder / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == base.digest
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == base.family
    assert config["hidden_size"] == base.hidden_size
    assert config["num_hidden_layers"] == base.num_layers
    assert 0 < base.max_length <= config["max_position_embeddings"]
    tensors = _header(weights)
    counted = {name: math.prod(t["shape"]) for name, t in tensors.items() if not name.endswith("position_ids")}
    assert sum(counted.values()) == base.parameters
    assert (folder / "tokenizer.json").exists()


def _header(weights: Path) -> dict[str, Any]:
    with weights.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return header


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_familys_head_is_where_transformers_keeps_it(family: Family) -> None:
    """A base that lacks it is refused at the submit; a wrong name would refuse every base."""
    config = AutoConfig.for_model(family.model_type)
    if family.kind == "image":
        assert family.head == ""
        return
    if family.kind != "encoder":
        assert config.tie_word_embeddings == family.tied
        config.tie_word_embeddings = False
    task = next(name for name in family.tasks if TASKS[name].head == "pretrained")
    with torch.device("meta"):
        model = family_for(family.model_type, task).auto_class.from_config(config)
    assert family.head in model.state_dict()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_key_that_a_familys_config_reads_is_passed_on(family: Family) -> None:
    """Dropping one would make another model of it, and no error."""
    config = AutoConfig.for_model(family.model_type)
    read = {name for name in config.to_dict() if not name.startswith("_")}
    # How it is called and what it answers with is the trainer's to say.
    read -= {"output_attentions", "output_hidden_states", "return_dict"}
    assert read - COMMON_KEYS - family.keys == set()
    for key in (family.hidden_size, family.num_layers, family.max_length):
        assert not key or hasattr(config, key)


def test_the_codes_of_languages_are_those_of_transformers_tokenizers() -> None:
    assert tokenization_mbart50.FAIRSEQ_LANGUAGE_CODES == list(languages.MBART_50)
    assert tokenization_m2m_100.FAIRSEQ_LANGUAGE_CODES == {
        "m2m100": list(languages.M2M_100),
        "wmt21": list(languages.WMT_21),
    }
