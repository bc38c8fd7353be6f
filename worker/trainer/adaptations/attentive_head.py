"""Attentive head: the score that weighs the tokens trains besides the head, on states that are computed once."""

from __future__ import annotations

from transformers import PreTrainedModel

from app.catalog.adaptations import AttentiveHead
from worker.trainer.adaptations.adapter import Adapter
from worker.trainer.failure import TrainerFailure
from worker.trainer.families.attention import SharedKey
from worker.trainer.families.interface import AttentiveFamily, Family


def _parameters(model: PreTrainedModel, family: Family, adaptation: AttentiveHead) -> list[str]:
    return [scores(model, family)]


def scores(model: PreTrainedModel, family: Family) -> str:
    """Name of the parameter that weighs the tokens, which is added where it is not there yet."""
    if not isinstance(family, AttentiveFamily):
        raise TrainerFailure("base_model_invalid", "this family has no attention that pools")
    return family.attend(model)


def _merge(model: PreTrainedModel) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, SharedKey):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.merged())


ATTENTIVE_HEAD = Adapter(_parameters, _merge)
