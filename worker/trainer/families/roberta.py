"""RoBERTa (Liu et al. 2019): the classification head's own dense layer takes the pooler's place."""

from __future__ import annotations

from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification

from worker.trainer.families.encoder import EncoderFamily
from worker.trainer.families.transformer import TransformerFamily

_POSITION_OFFSET = 2  # positions start behind the padding index, which is 1

ROBERTA = EncoderFamily(
    model_type="roberta",
    body="roberta",
    pooler="classifier.dense",
    head="classifier.out_proj",
    position_offset=_POSITION_OFFSET,
)

ROBERTA_TOKENS = TransformerFamily(
    model_type="roberta",
    auto_class=AutoModelForTokenClassification,
    stacks=("roberta.encoder.layer",),
    head="classifier.",
    lora_targets=ROBERTA.lora_targets,
    unmovable=ROBERTA.unmovable,
    position_offset=_POSITION_OFFSET,
)

ROBERTA_MASKED = TransformerFamily(
    model_type="roberta",
    auto_class=AutoModelForMaskedLM,
    stacks=("roberta.encoder.layer",),
    lora_targets=ROBERTA.lora_targets,
    unmovable=ROBERTA.unmovable,
    position_offset=_POSITION_OFFSET,
)
