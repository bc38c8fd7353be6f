"""L, S and I on every family: full and LoRA, float64 and float32, with and without checkpointing, one and several rows
a unit."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from tests.trainer.dp.cases import CASES, Batch, build, to_dtype, trainable
from tests.trainer.dp.checks import check_loop, check_sensitivity, distance, with_scale
from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.dp.functional import FunctionalEngine
from worker.trainer.dp.step import TOLERANCE

ADAPTED = [(name, lora) for name, case in CASES.items() for lora in (False, True) if not lora or case.lora_targets]
# transformers offers none for the others.
CHECKPOINTED = [
    (name, lora)
    for name, lora in ADAPTED
    if name not in ("mpnet", "albert", "convnext", "groupnorm") and not name.startswith(("resnet", "efficientnet"))
]
OWN_UNIT = torch.arange(6)
SEVERAL_ROWS = torch.tensor([40, 7, 7, 40, 7, 3])


@pytest.mark.parametrize("unit_index", [OWN_UNIT, SEVERAL_ROWS], ids=["rows", "units"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 0.0), (torch.float32, 2e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize(("name", "lora"), ADAPTED)
def test_equals_loop_over_units(
    name: str, lora: bool, dtype: torch.dtype, tolerance: float, unit_index: Tensor
) -> None:
    model = build(name, lora=lora, dtype=dtype)
    batch = to_dtype(CASES[name].batch(6), dtype)
    check_loop(
        BookKeepingEngine,
        model,
        trainable(model),
        CASES[name].loss,
        batch,
        unit_index,
        tolerance or CASES[name].tolerance,
    )


@pytest.mark.parametrize(("name", "lora"), CHECKPOINTED)
def test_equals_loop_over_units_with_checkpointing(name: str, lora: bool) -> None:
    model = build(name, lora=lora, checkpointing=True)
    recomputed = _count_forwards(model)
    batch = to_dtype(CASES[name].batch(6), torch.float64)
    check_loop(BookKeepingEngine, model, trainable(model), CASES[name].loss, batch, SEVERAL_ROWS, CASES[name].tolerance)
    assert recomputed()


def _count_forwards(model: nn.Module):
    """Whether some layer ran more often than the loss was computed: checkpointing was really on."""
    counts: dict[nn.Module, int] = {}

    def count(module: nn.Module, inputs: object) -> None:
        counts[module] = counts.get(module, 0) + 1

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(count)
    return lambda: max(counts.values()) > min(counts.values())


@pytest.mark.parametrize(("name", "lora"), [("bert", False), ("gpt2", False), ("vit", True), ("groupnorm", False)])
def test_fallback_equals_loop_over_units(name: str, lora: bool) -> None:
    model = build(name, lora=lora)
    batch = to_dtype(CASES[name].batch(6), torch.float64)
    for unit_index in (OWN_UNIT, SEVERAL_ROWS):
        check_loop(FunctionalEngine, model, trainable(model), CASES[name].loss, batch, unit_index, 1e-12)


def test_fallback_equals_loop_where_weights_are_standardized() -> None:
    """BiT's: the standardization of a convolution's weights is no layer that the tape knows, GroupNorm trains."""
    torch.manual_seed(0)
    config = hf.BitConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_groups=8, num_labels=3)
    model = hf.BitForImageClassification(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    batch = to_dtype(CASES["resnet"].batch(6), torch.float64)
    for unit_index in (OWN_UNIT, SEVERAL_ROWS):
        check_loop(FunctionalEngine, model, trainable(model), CASES["resnet"].loss, batch, unit_index, 1e-12)


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer"])
@pytest.mark.parametrize(("name", "lora"), ADAPTED)
def test_sensitivity(name: str, lora: bool, clipping: str) -> None:
    model = build(name, lora=lora, dtype=torch.float32)
    batch = to_dtype(CASES[name].batch(6), torch.float32)
    batch["scale"] = torch.tensor([1.0, 1e6, 1e-4, torch.inf, 30.0, torch.nan])
    for unit_index in (OWN_UNIT, SEVERAL_ROWS):
        check_sensitivity(
            BookKeepingEngine, model, trainable(model), with_scale(CASES[name].loss), batch, unit_index, clipping
        )


@pytest.mark.parametrize(("name", "lora"), ADAPTED)
def test_update_does_not_depend_on_the_cut(name: str, lora: bool) -> None:
    """I: one physical batch, several, another order, more padding."""
    model = build(name, lora=lora)
    case = CASES[name]
    batch = to_dtype(case.batch(6), torch.float64)
    engine = BookKeepingEngine(model, trainable(model), case.loss, clipping="flat", max_grad_norm=0.05)
    engine.accumulate(batch, SEVERAL_ROWS)
    expected = engine.take()
    for rows in ([0, 3], [1, 2, 4], [5]):
        engine.accumulate({key: value[rows] for key, value in batch.items()}, SEVERAL_ROWS[rows])
    assert distance(engine.take(), expected) < case.tolerance
    order = torch.tensor([5, 2, 0, 4, 3, 1])
    engine.accumulate({key: value[order] for key, value in batch.items()}, SEVERAL_ROWS[order])
    assert distance(engine.take(), expected) < case.tolerance
    engine.accumulate(_more_padding(batch), SEVERAL_ROWS)
    assert distance(engine.take(), expected) < case.tolerance


def _more_padding(batch: Batch) -> Batch:
    widened = dict(batch)
    for key, value in (("input_ids", 1), ("decoder_input_ids", 1), ("attention_mask", 0)):
        if key in batch:
            widened[key] = F.pad(batch[key], (0, 3), value=value)
    return widened


@pytest.mark.parametrize(("name", "lora"), CHECKPOINTED)
def test_sensitivity_and_the_cut_with_checkpointing(name: str, lora: bool) -> None:
    """S and I in float32 where forwards are computed again."""
    model = build(name, lora=lora, dtype=torch.float32, checkpointing=True)
    batch, names, loss = CASES[name].batch(6), trainable(model), CASES[name].loss
    engine = BookKeepingEngine(model, names, loss, clipping="flat", max_grad_norm=0.05)
    engine.accumulate(batch, SEVERAL_ROWS)
    expected = engine.take()
    for rows in ([0, 3], [1, 2, 4], [5]):
        engine.accumulate({key: value[rows] for key, value in batch.items()}, SEVERAL_ROWS[rows])
    assert distance(engine.take(), expected) < 0.05 * TOLERANCE
    batch["scale"] = torch.tensor([1.0, 1e6, 1e-4, torch.inf, 30.0, torch.nan])
    check_sensitivity(BookKeepingEngine, model, names, with_scale(loss), batch, OWN_UNIT, "flat")


def test_unclipped_gradients_never_reach_autograd() -> None:
    model = build("gpt2")
    batch = CASES["gpt2"].batch(4)
    engine = BookKeepingEngine(model, trainable(model), CASES["gpt2"].loss, clipping="flat", max_grad_norm=1.0)
    engine.accumulate(batch, torch.arange(4))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert not any(value.requires_grad for value in engine.take().values())


@pytest.mark.parametrize("name", list(CASES))
def test_buffers_stay_as_they_are(name: str) -> None:
    model = build(name)
    before = {key: value.clone() for key, value in model.named_buffers()}
    engine = BookKeepingEngine(model, trainable(model), CASES[name].loss, clipping="flat", max_grad_norm=1.0)
    engine.accumulate(to_dtype(CASES[name].batch(4), torch.float64), torch.arange(4))
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())
