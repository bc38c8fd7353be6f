"""The families that the trainer knows, by config.json's model_type and the model class that a task trains."""

from __future__ import annotations

from app.catalog.tasks import TASKS, ModelClass
from worker.trainer.failure import TrainerFailure
from worker.trainer.families.bart import BART, M2M_100, MARIAN, MBART
from worker.trainer.families.bert import BERT
from worker.trainer.families.distilbert import DISTILBERT
from worker.trainer.families.gpt2 import GPT2_CAUSAL
from worker.trainer.families.images import (
    BIT,
    CONVNEXT,
    DEIT,
    EFFICIENTNET,
    EFFICIENTNET_GROUP_NORM,
    RESNET,
    RESNET_GROUP_NORM,
    VIT,
)
from worker.trainer.families.interface import Family
from worker.trainer.families.llama import LLAMA_CAUSAL
from worker.trainer.families.qwen import QWEN2_CAUSAL, QWEN3_CAUSAL
from worker.trainer.families.roberta import ROBERTA, XLM_ROBERTA
from worker.trainer.families.t5 import MT5, T5

FAMILIES: dict[str, dict[ModelClass, Family]] = {
    **{
        encoder.model_type: {
            "sequence_classification": encoder,
            "token_classification": encoder.for_tokens(),
            "masked_lm": encoder.for_masked_lm(),
        }
        for encoder in (BERT, ROBERTA, XLM_ROBERTA, DISTILBERT)
    },
    **{
        family.model_type: {"image_classification": family}
        for family in (VIT, DEIT, CONVNEXT, RESNET, RESNET_GROUP_NORM, BIT, EFFICIENTNET, EFFICIENTNET_GROUP_NORM)
    },
    "gpt2": {"causal_lm": GPT2_CAUSAL},
    "llama": {"causal_lm": LLAMA_CAUSAL},
    "qwen2": {"causal_lm": QWEN2_CAUSAL},
    "qwen3": {"causal_lm": QWEN3_CAUSAL},
    "t5": {"seq2seq_lm": T5},
    "mt5": {"seq2seq_lm": MT5},
    "bart": {"seq2seq_lm": BART},
    "marian": {"seq2seq_lm": MARIAN},
    "mbart": {"seq2seq_lm": MBART},
    "m2m_100": {"seq2seq_lm": M2M_100},
}


def family_for(model_type: str, task_type: str) -> Family:
    """TrainerFailure `base_model_invalid` where the trainer knows none: the catalog offers no such pair."""
    family = FAMILIES.get(model_type, {}).get(TASKS[task_type].model)
    if family is None:
        raise TrainerFailure("base_model_invalid", f"no family {model_type} for {task_type}")
    return family
