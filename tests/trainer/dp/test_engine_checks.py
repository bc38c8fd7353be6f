"""What an engine refuses, what it falls back on and says so, and records that are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.trainer.dp.cases import CASES, Batch, build, classification_loss, trainable
from tests.trainer.dp.checks import check_loop, distance
from worker.trainer.dp import rewrites
from worker.trainer.dp.book_keeping import BookKeepingEngine
from worker.trainer.dp.engine import EngineError
from worker.trainer.dp.engines import make_engine
from worker.trainer.dp.functional import FunctionalEngine
from worker.trainer.dp.verify import stand_in

ENGINES = [BookKeepingEngine, FunctionalEngine, make_engine]
TEXT = CASES["bert"].batch(5)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def _data(rows: int = 5, width: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(3)
    return {"x": torch.randn(rows, width, generator=generator), "y": torch.arange(rows) % 3}


@pytest.mark.parametrize("make", ENGINES)
@pytest.mark.parametrize(
    "reduce", [lambda losses: losses.mean(), lambda losses: losses, lambda losses: losses[:, None]]
)
def test_a_loss_that_is_not_per_record_is_refused(make, reduce) -> None:
    model = nn.Linear(6, 3)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return reduce(torch.cat([_loss(module, batch)] * 2))  # two values, even where rows come one by one

    engine = make(model, trainable(model), loss, clipping="flat", max_grad_norm=1.0)
    with pytest.raises(EngineError) as caught:
        engine.accumulate(_data(), torch.arange(5))
    assert caught.value.code == "loss_not_per_record"


@pytest.mark.parametrize("make", ENGINES)
def test_what_is_trainable_must_be_what_was_named(make) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    with pytest.raises(EngineError, match="requires_grad"):
        make(model, ["1.weight", "1.bias"], _loss, clipping="flat", max_grad_norm=1.0)
    with pytest.raises(EngineError, match="not parameters"):
        make(model, ["2.weight"], _loss, clipping="flat", max_grad_norm=1.0)


@pytest.mark.parametrize("make", ENGINES)
def test_layers_that_couple_records_are_refused(make) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))
    with pytest.raises(EngineError) as caught:
        make(model, trainable(model), _loss, clipping="flat", max_grad_norm=1.0)
    assert caught.value.code == "couples_records"
    model.eval()
    engine = make(model, trainable(model), _loss, clipping="flat", max_grad_norm=1.0)
    engine.accumulate(_data(), torch.arange(5))
    model.train()
    with pytest.raises(EngineError, match="statistics over records"):
        engine.accumulate(_data(), torch.arange(5))


@pytest.mark.parametrize("make", ENGINES)
def test_records_that_are_not_finite_contribute_exactly_zero(make) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    data = {**_data(), "x": _data()["x"].double()}
    engine = make(model, trainable(model), _loss, clipping="flat", max_grad_norm=0.1)
    engine.accumulate({key: value[[0, 2, 4]] for key, value in data.items()}, torch.arange(3))
    expected = engine.take()
    data["x"][1, 2], data["x"][3, 0] = torch.inf, torch.nan
    engine.accumulate(data, torch.arange(5))
    assert distance(engine.take(), expected) < 1e-14


def test_padding_idx_takes_no_part() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=2), nn.Flatten(), nn.Linear(12, 3)).double()
    data = {"x": torch.tensor([[2, 2, 1], [3, 2, 3], [2, 2, 2]]), "y": torch.arange(3)}
    check_loop(BookKeepingEngine, model, trainable(model), _loss, data, torch.arange(3), 1e-12)
    assert torch.count_nonzero(_sums(model, data)["0.weight"][2]) == 0


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(2, 3, (2, 4), padding="same"), lambda: nn.Conv1d(2, 3, 4, padding="same")]
)
def test_padding_of_even_kernels(make) -> None:
    convolution = make().double()
    model = nn.Sequential(convolution, nn.Flatten(), nn.LazyLinear(3, dtype=torch.float64))
    x = torch.randn(4, 2, 5, *([6] if isinstance(convolution, nn.Conv2d) else []), dtype=torch.float64)
    model(x)
    data = {"x": x, "y": torch.arange(4) % 3}
    check_loop(BookKeepingEngine, model, trainable(model), _loss, data, torch.tensor([0, 1, 1, 2]), 1e-12)


def _sums(model: nn.Module, data: Batch) -> dict[str, Tensor]:
    engine = BookKeepingEngine(model, trainable(model), _loss, clipping="flat", max_grad_norm=1.0)
    engine.accumulate(data, torch.arange(len(data["y"])))
    return engine.take()


class _Bilinear(nn.Module):
    """Uses a parameter by a function that the tape does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.table = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,ij->bj", torch.tanh(self.first(x)), self.table)


class _SharedBias(nn.Module):
    """A lookup without the batch dimension, broadcast over it: what T5's relative positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(6, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.positions(torch.arange(6)[:, None].expand(6, 2) // 2)  # (6, 2, 2): no rows
        return self.head((x[:, :, None, None] * shared).mean((1, 2)))


class _Lookalike(nn.Module):
    """Takes rows for time: shapes fit when the batch has as many rows as there are positions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        table = torch.eye(4, 3)[:, None, :] * self.scale
        return (x[:, :4] @ table[:, 0]) if len(x) == 4 else (x[:, :4] @ (torch.eye(4, 3) * self.scale))


@pytest.mark.parametrize(
    ("model", "concerned"), [(_Bilinear(), "table"), (_SharedBias(), "positions.weight"), (_Lookalike(), "scale")]
)
def test_unknown_uses_fall_back_exactly_and_say_so(model: nn.Module, concerned: str) -> None:
    model = model.double()
    data = {**_data(), "x": _data()["x"].double()}

    def make(*args, **kwargs):
        made.append(make_engine(*args, **kwargs))
        return made[-1]

    made: list = []
    check_loop(make, model, trainable(model), _loss, data, torch.tensor([0, 1, 1, 2, 3]), 1e-12)
    assert made[0].fallbacks == (concerned,)


def test_a_use_behind_the_tapes_back_is_noticed() -> None:
    model = nn.Linear(6, 3)
    weight, bias = model.weight, model.bias

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return _loss(module, batch) + (batch["x"] @ weight.t() + bias).square().sum(1)

    engine = make_engine(model, trainable(model), loss, clipping="flat", max_grad_norm=1.0, example=_data())
    assert set(engine.fallbacks) == {"weight", "bias"}


def test_a_wrong_tape_is_noticed_by_the_dry_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its rewrite, T5's bias has no gradient by row: the dry step sends it to the fallback."""
    model = build("t5", dtype=torch.float32)
    monkeypatch.setattr(rewrites, "_REWRITES", {})
    example = CASES["t5"].batch(5)
    engine = make_engine(model, trainable(model), CASES["t5"].loss, clipping="flat", max_grad_norm=1.0, example=example)
    assert any("relative_attention_bias" in name for name in engine.fallbacks)


@pytest.mark.parametrize("name", list(CASES))
def test_every_family_takes_the_fast_engine(name: str) -> None:
    model = build(name, dtype=torch.float32)
    batch = CASES[name].batch(5)
    engine = make_engine(
        model, trainable(model), CASES[name].loss, clipping="flat", max_grad_norm=1.0, example=stand_in(batch)
    )
    assert isinstance(engine, BookKeepingEngine)
    assert engine.fallbacks == ()


def test_stand_ins_hold_nothing_of_the_batch() -> None:
    one, other = CASES["bart"].batch(9, seed=1), CASES["bart"].batch(9, seed=2)
    made = stand_in(one)
    assert all(torch.equal(value, stand_in(other)[key]) for key, value in made.items())
    assert {key: (value.dtype, value.ndim) for key, value in made.items()} == {
        key: (value.dtype, value.ndim) for key, value in one.items()
    }


def test_the_dry_step_leaves_modes_and_gradients_alone() -> None:
    model = build("bert", dtype=torch.float32).train()
    model.classifier.eval()
    make_engine(model, trainable(model), classification_loss, clipping="flat", max_grad_norm=1.0, example=TEXT)
    assert model.training
    assert not model.classifier.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unused_parameters_have_zero_gradient() -> None:
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "idle": nn.Linear(2, 2)})

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return _loss(module["used"], batch)

    engine = make_engine(model, trainable(model), loss, clipping="flat", max_grad_norm=1.0)
    engine.accumulate(_data(), torch.arange(5))
    assert torch.count_nonzero(engine.take()["idle.weight"]) == 0


@pytest.mark.parametrize("unit_index", [torch.zeros(5), torch.zeros(5, 1, dtype=torch.long)])
def test_units_are_a_vector_of_integers(unit_index: Tensor) -> None:
    model = nn.Linear(6, 3)
    engine = BookKeepingEngine(model, trainable(model), _loss, clipping="flat", max_grad_norm=1.0)
    with pytest.raises(EngineError, match="vector of integers"):
        engine.accumulate(_data(), unit_index)


def test_one_record_does_not_move_anothers_output() -> None:
    model = build("bert").eval()
    batch = CASES["bert"].batch(4)
    before = classification_loss(model, batch)
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][2] = 7
    after = classification_loss(model, batch)
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
