"""Last layers: the base's last n layers; more than it has is all of them."""

from __future__ import annotations

from transformers import PreTrainedModel

from app.catalog.adaptations import LastLayers
from worker.trainer.adaptations.adapter import Adapter
from worker.trainer.families.interface import Family


def _parameters(model: PreTrainedModel, family: Family, adaptation: LastLayers) -> list[str]:
    return family.body_parameters(model, last_layers=adaptation.num_layers)


LAST_LAYERS = Adapter(_parameters)
