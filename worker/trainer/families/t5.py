"""T5 and mT5 (Raffel et al. 2020; Xue et al. 2021): relative position biases, kept in the first block of each stack and
used by all. The head is tied to the embedding, unless the checkpoint has one of its own: T5 1.1, flan, mT5.
"""

from __future__ import annotations

from transformers import AutoModelForSeq2SeqLM

from worker.trainer.families.transformer import TransformerFamily


def _t5(model_type: str) -> TransformerFamily:
    return TransformerFamily(
        model_type=model_type,
        auto_class=AutoModelForSeq2SeqLM,
        stacks=("encoder.block", "decoder.block"),
        lora_targets=("q", "v"),
    )


T5, MT5 = _t5("t5"), _t5("mt5")
