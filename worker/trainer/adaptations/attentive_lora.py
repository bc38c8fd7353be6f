"""Attentive LoRA: low-rank updates of every matrix of the blocks that an attentive head reads, and its scores.

Of an update B A only B trains; A stays as it was drawn (Sun et al. 2024, "Improving LoRA in privacy-preserving
federated learning"). B starts at zero, where A has no gradient and would take in noise alone; and noise falls on half
as many numbers.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from app.catalog.adaptations import AttentiveLora
from worker.trainer.adaptations.adapter import Adapter
from worker.trainer.adaptations.attentive_head import ATTENTIVE_HEAD, scores
from worker.trainer.adaptations.lora import inject, merge
from worker.trainer.families.interface import Family


def _parameters(model: PreTrainedModel, family: Family, adaptation: AttentiveLora) -> list[str]:
    names = (name.removesuffix(".weight") for name in family.body_parameters(model) if name.endswith(".weight"))
    matrices = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
    factors = inject(model, matrices, adaptation)
    for place, name in enumerate(name for name in factors if ".lora_A." in name):
        # In no checkpoint: the next attempt draws the same, whatever else it drew before.
        generator = torch.Generator().manual_seed(torch.initial_seed() + place)
        nn.init.kaiming_uniform_(model.get_parameter(name), a=math.sqrt(5), generator=generator)  # as peft's
    return [scores(model, family), *(name for name in factors if ".lora_B." in name)]


def _merge(model: PreTrainedModel) -> None:
    merge(model)
    ATTENTIVE_HEAD.merge(model)


ATTENTIVE_LORA = Adapter(_parameters, _merge)
