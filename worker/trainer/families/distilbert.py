"""DistilBERT (Sanh et al. 2019): half of BERT's layers, no token types; its classifier has a ReLU behind the pooler."""

from __future__ import annotations

from worker.trainer.families.encoder import EncoderFamily

DISTILBERT = EncoderFamily(
    model_type="distilbert",
    body="distilbert",
    pooler="pre_classifier",
    head="classifier",
    lora_targets=("q_lin", "v_lin"),
    unmovable=("attention.k_lin.bias",),
    stack="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    mixing="attention.out_lin",
    mixing_norm="sa_layer_norm",
    feed_forward="ffn.lin2",
    norm="output_layer_norm",
    rectified=True,
)
