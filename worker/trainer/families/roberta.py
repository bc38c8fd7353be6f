"""RoBERTa (Liu et al. 2019), and XLM-RoBERTa (Conneau et al. 2020), which is RoBERTa trained on a hundred languages.

The classification head's own dense layer takes the pooler's place.
"""

from __future__ import annotations

import dataclasses

from worker.trainer.families.encoder import EncoderFamily

ROBERTA = EncoderFamily(
    model_type="roberta",
    body="roberta",
    pooler="classifier.dense",
    head="classifier.out_proj",
    position_offset=2,  # positions start behind the padding index, which is 1
)

XLM_ROBERTA = dataclasses.replace(ROBERTA, model_type="xlm-roberta")
