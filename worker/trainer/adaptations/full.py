"""Full: every weight of the base."""

from __future__ import annotations

from transformers import PreTrainedModel

from app.catalog.adaptations import Full
from worker.trainer.adaptations.adapter import Adapter
from worker.trainer.families.interface import Family


def _parameters(model: PreTrainedModel, family: Family, adaptation: Full) -> list[str]:
    return family.body_parameters(model)


FULL = Adapter(_parameters)
