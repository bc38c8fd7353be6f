"""BERT (Devlin et al. 2019): the pooler belongs to the body, the classifier is the head."""

from __future__ import annotations

from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification

from worker.trainer.families.encoder import EncoderFamily
from worker.trainer.families.transformer import TransformerFamily

BERT = EncoderFamily(model_type="bert", body="bert", pooler="bert.pooler.dense", head="classifier")

BERT_TOKENS = TransformerFamily(
    model_type="bert",
    auto_class=AutoModelForTokenClassification,
    stacks=("bert.encoder.layer",),
    head="classifier.",
    lora_targets=BERT.lora_targets,
    unmovable=BERT.unmovable,
)

BERT_MASKED = TransformerFamily(
    model_type="bert",
    auto_class=AutoModelForMaskedLM,
    stacks=("bert.encoder.layer",),
    lora_targets=BERT.lora_targets,
    unmovable=BERT.unmovable,
)
