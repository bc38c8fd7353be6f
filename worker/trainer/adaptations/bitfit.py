"""BitFit: the bias terms of the base's layers (Zaken et al. 2022)."""

from __future__ import annotations

from transformers import PreTrainedModel

from app.catalog.adaptations import BitFit
from worker.trainer.adaptations.adapter import Adapter
from worker.trainer.families.interface import Family


def _parameters(model: PreTrainedModel, family: Family, adaptation: BitFit) -> list[str]:
    return [name for name in family.body_parameters(model) if name.endswith(".bias")]


BITFIT = Adapter(_parameters)
