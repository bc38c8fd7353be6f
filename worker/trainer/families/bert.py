"""BERT (Devlin et al. 2019): the pooler belongs to the body, the classifier is the head."""

from __future__ import annotations

from worker.trainer.families.encoder import EncoderFamily

BERT = EncoderFamily(model_type="bert", body="bert", pooler="bert.pooler.dense", head="classifier")
