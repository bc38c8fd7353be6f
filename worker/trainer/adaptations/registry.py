"""The adaptations that the trainer can execute, by the catalog's type."""

from __future__ import annotations

from worker.trainer.adaptations.adapter import Adapter
from worker.trainer.adaptations.attentive_head import ATTENTIVE_HEAD
from worker.trainer.adaptations.attentive_lora import ATTENTIVE_LORA
from worker.trainer.adaptations.bitfit import BITFIT
from worker.trainer.adaptations.freeze import FREEZE
from worker.trainer.adaptations.full import FULL
from worker.trainer.adaptations.head import HEAD
from worker.trainer.adaptations.last_layers import LAST_LAYERS
from worker.trainer.adaptations.lora import LORA
from worker.trainer.adaptations.temperature import TEMPERATURE

ADAPTERS: dict[str, Adapter] = {
    "full": FULL,
    "freeze": FREEZE,
    "last_layers": LAST_LAYERS,
    "head": HEAD,
    "attentive_head": ATTENTIVE_HEAD,
    "lora": LORA,
    "attentive_lora": ATTENTIVE_LORA,
    "bitfit": BITFIT,
    "temperature": TEMPERATURE,
}
