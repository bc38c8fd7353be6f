"""The families that the trainer knows; a base of another one is refused at load."""

from __future__ import annotations

from worker.trainer.families.bert import BERT
from worker.trainer.families.encoder import EncoderFamily
from worker.trainer.families.roberta import ROBERTA

FAMILIES: dict[str, EncoderFamily] = {family.model_type: family for family in (BERT, ROBERTA)}
