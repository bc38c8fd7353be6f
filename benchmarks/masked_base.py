"""MiniLM with a masked-LM head that nobody pretrained: no package carries a small encoder with one that was."""

from __future__ import annotations

import shutil
from pathlib import Path

from app.catalog.bases import BASES
from app.models.service import base_path
from benchmarks.quality_sets import MINILM

#: What of the package's folder goes with the weights.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "README.md")


def make(folder: Path) -> None:
    """Writes the model into `folder`, which is made: to be offered, it lies in PRIVTUNE_MODELS_DIR.

    Its head's dense layer is the identity, its norm has gains of one and no shifts, its output matrix is the embedding
    of words (tied) and its output biases are zero. Without training it says of a token little more than that its vector
    was likest to that of some word; all it can tell it learns in the job. The body is the package's, bit for bit.
    """
    import torch
    from transformers import BertForMaskedLM

    package = base_path(BASES[MINILM])
    model = BertForMaskedLM.from_pretrained(package, dtype=torch.float32)
    head = model.cls.predictions
    with torch.no_grad():
        torch.nn.init.eye_(head.transform.dense.weight)
        torch.nn.init.ones_(head.transform.LayerNorm.weight)
        for bias in (head.transform.dense.bias, head.transform.LayerNorm.bias, head.bias):
            torch.nn.init.zeros_(bias)
    model.save_pretrained(folder)
    for name in _TOKENIZER:
        shutil.copyfile(package / name, folder / name)
