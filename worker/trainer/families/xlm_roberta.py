"""XLM-RoBERTa (Conneau et al. 2020): RoBERTa, trained on a hundred languages."""

from __future__ import annotations

import dataclasses

from worker.trainer.families.roberta import ROBERTA, ROBERTA_MASKED, ROBERTA_TOKENS

XLM_ROBERTA = dataclasses.replace(ROBERTA, model_type="xlm-roberta")
XLM_ROBERTA_TOKENS = dataclasses.replace(ROBERTA_TOKENS, model_type="xlm-roberta")
XLM_ROBERTA_MASKED = dataclasses.replace(ROBERTA_MASKED, model_type="xlm-roberta")
