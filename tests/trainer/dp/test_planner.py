"""Which layers take Gram matrices and which write gradients out, and that the choice changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.trainer.dp.cases import CASES, build, to_dtype, trainable
from tests.trainer.dp.checks import check_loop, distance
from worker.trainer.dp import outer
from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.dp.outer import planned_form

OWN_UNIT = torch.arange(6)
SEVERAL_ROWS = torch.tensor([40, 7, 7, 40, 7, 3])


@pytest.mark.parametrize(
    ("rows", "units", "time", "left", "right", "form"),
    [
        (64, 64, 1, 2, 384, "ghost"),  # a head: ‖a‖²‖g‖²
        (64, 64, 128, 384, 384, "ghost"),
        (64, 64, 128, 1536, 384, "ghost"),
        (16, 16, 512, 384, 384, "instantiate"),
        (64, 64, 128, 8, 384, "instantiate"),  # LoRA
        (64, 8, 128, 384, 384, "instantiate"),  # eight rows of one person have one gradient together
        (4, 4, 256, 50257, 768, "ghost"),  # a language model's head
    ],
)
def test_form_follows_from_the_shapes(rows: int, units: int, time: int, left: int, right: int, form: str) -> None:
    assert planned_form(rows=rows, units=units, time=time, left=left, right=right) == form


@pytest.mark.parametrize("unit_index", [OWN_UNIT, SEVERAL_ROWS], ids=["rows", "units"])
@pytest.mark.parametrize(("name", "lora"), [("bert", False), ("gpt2", True), ("qwen3_tied", False), ("vit", False)])
def test_update_does_not_depend_on_the_form(
    monkeypatch: pytest.MonkeyPatch, name: str, lora: bool, unit_index: Tensor
) -> None:
    """I, and L for either form; a few rows at a time as well."""
    model, case = build(name, lora=lora), CASES[name]
    batch = to_dtype(case.batch(6), torch.float64)
    sums = []
    for form, gathered in (("ghost", 1 << 24), ("instantiate", 1 << 24), ("instantiate", 1)):
        monkeypatch.setattr(outer, "planned_form", lambda form=form, **shapes: form)
        monkeypatch.setattr(outer, "_MAX_GATHERED", gathered)
        check_loop(BookKeepingEngine, model, trainable(model), case.loss, batch, unit_index, case.tolerance)
        engine = BookKeepingEngine(model, trainable(model), case.loss, clipping="flat", max_grad_norm=0.05)
        engine.accumulate(batch, unit_index)
        sums.append(engine.take())
    assert distance(sums[0], sums[1]) < case.tolerance
    assert distance(sums[0], sums[2]) < case.tolerance
