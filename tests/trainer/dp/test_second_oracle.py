"""L against Opacus in its hooks mode, where Opacus is right: it fails on BERT, GPT-2, T5, BART and tied weights."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.trainer.dp.cases import CASES, build, to_dtype, train_without_dropout, trainable
from tests.trainer.dp.oracles import opacus_squared_norms
from worker.trainer.dp.book_keeping import BookKeepingEngine


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["roberta", "xlm_roberta", "vit", "deit", "llama", "qwen2"])
def test_norms_equal_opacus(name: str) -> None:
    model = build(name)
    if name in ("vit", "deit"):  # Opacus knows no raw parameters
        getattr(model, name).embeddings.requires_grad_(False)
    if name in ("llama", "qwen2"):  # nor transformers' norms
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("norm" not in key)
    train_without_dropout(model)  # Opacus captures nothing in eval mode
    batch = to_dtype(CASES[name].batch(5), torch.float64)
    engine = BookKeepingEngine(model, trainable(model), CASES[name].loss, clipping="flat", max_grad_norm=1.0)
    ours = engine.accumulate(batch, torch.arange(5)).squared_norms
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = opacus_squared_norms(model, CASES[name].loss, batch)
    assert torch.allclose(ours, expected, rtol=CASES[name].tolerance)
