"""Freeze: every weight of the base but those whose names match a pattern."""

from __future__ import annotations

from transformers import PreTrainedModel

from app.catalog.adaptations import Freeze
from worker.trainer.adaptations.adapter import Adapter
from worker.trainer.families.interface import Family
from worker.trainer.families.loading import names_in_files


def _parameters(model: PreTrainedModel, family: Family, adaptation: Freeze) -> list[str]:
    in_files = names_in_files(model)
    return [name for name in family.body_parameters(model) if not any(map(adaptation.freezes, in_files[name]))]


FREEZE = Adapter(_parameters)
