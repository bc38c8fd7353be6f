"""BART, mBART, M2M-100 and Marian (Lewis et al. 2020; Tang et al. 2020; Fan et al. 2021; Junczys-Dowmunt et al. 2018):
one embedding for both stacks and the head, but for a Marian with a vocabulary for each side.

Marian's positions are sinusoids that transformers keeps as frozen parameters and computes again at loading; M2M-100's
(and NLLB-200's, which is the same architecture) are no parameters at all.
"""

from __future__ import annotations

from transformers import AutoModelForSeq2SeqLM

from worker.trainer.families.transformer import TransformerFamily


def _bart(model_type: str, *, fixed: tuple[str, ...] = ()) -> TransformerFamily:
    return TransformerFamily(
        model_type=model_type,
        auto_class=AutoModelForSeq2SeqLM,
        stacks=("model.encoder.layers", "model.decoder.layers"),
        unmovable=("k_proj.bias",),  # softmax ignores a shift of all keys
        fixed=fixed,
    )


BART, MBART, M2M_100 = _bart("bart"), _bart("mbart"), _bart("m2m_100")
MARIAN = _bart("marian", fixed=("embed_positions.weight",))
