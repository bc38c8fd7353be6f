"""Head: nothing besides the head trains, so that the body's features are computed once."""

from __future__ import annotations

from transformers import PreTrainedModel

from app.catalog.adaptations import Head
from worker.trainer.adaptations.adapter import Adapter
from worker.trainer.families.interface import Family


def _parameters(model: PreTrainedModel, family: Family, adaptation: Head) -> list[str]:
    return []


HEAD = Adapter(_parameters)
