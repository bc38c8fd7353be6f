"""The measured recipes, and how a request's numbers change them."""

from __future__ import annotations

import dataclasses

import pytest

from app.catalog.adaptations import (
    ADAPTATIONS,
    AttentiveHead,
    AttentiveLora,
    BitFit,
    Full,
    Head,
    Lora,
    Temperature,
)
from app.catalog.recipes import recipe_for
from app.privacy.calibration import calibrate
from app.privacy.plan import GaussianRelease, SampledGaussian


def _recipe(adaptation=None, units=6920, epsilon=3.0, **asked):
    return recipe_for("text_classification", adaptation, units, epsilon, **asked)


def test_auto_is_the_measured_head() -> None:
    recipe, reason = _recipe()
    (phase,) = recipe.phases
    assert (phase.sample_rate, phase.num_steps, phase.learning_rate, phase.averaging) == (1 / 8, 160, 0.1, 0.95)
    assert (recipe.clipping, recipe.max_grad_norm, recipe.centring_noise_multiplier) == ("flat", 0.3, 20.0)
    assert (phase.adaptation, reason) == (Head(), "few_units")


@pytest.mark.parametrize(
    ("units", "epsilon", "adaptation", "reason"),
    [
        (10, 3.0, Head(), "few_units"),
        (20_000, None, Head(), "few_units"),
        (20_001, 0.5, Head(), "small_epsilon"),
        (20_001, 1.0, Lora(), "many_units"),
        (1_000_000, None, Lora(), "many_units"),
    ],
)
def test_auto_and_why(units: int, epsilon: float | None, adaptation: object, reason: str) -> None:
    recipe, why = _recipe(units=units, epsilon=epsilon)
    assert (recipe.phases[-1].adaptation, why) == (adaptation, reason)


def test_a_head_of_one_class_is_clipped_so_that_its_probabilities_hold() -> None:
    """To a share of the features' length; what was measured with automatic clipping keeps it."""
    for adaptation in (Head(), AttentiveHead()):
        recipe, _ = _recipe(adaptation, num_layers=6, width=256)
        assert (recipe.clipping, recipe.max_grad_norm) == ("flat", pytest.approx(0.3 * 16))
        assert recipe.phases[0].head_learning_rate == pytest.approx(0.1 / 16)
        several, _ = _recipe(adaptation, num_layers=6, multi_label=True)
        assert (several.clipping, several.phases[0].head_learning_rate) == ("automatic", 0.2)
    for task, adaptation in (("text_regression", Head()), ("token_classification", Head()), ("instruction", Lora())):
        assert recipe_for(task, adaptation, 1350, 3.0)[0].clipping == "automatic"
    assert _recipe(Lora())[0].clipping == "automatic"


def test_tokens_and_numbers_follow_the_same_rule_at_rates_of_their_own() -> None:
    recipe, why = recipe_for("token_classification", None, 1350, 3.0)
    (phase,) = recipe.phases
    assert (phase.adaptation, phase.num_steps, phase.learning_rate, why) == (Head(), 160, 1e-2, "few_units")
    assert recipe.centring_noise_multiplier is None
    assert recipe_for("text_regression", None, 1350, 3.0)[0].phases[0].learning_rate == 0.06
    assert recipe_for("token_classification", None, 20_001, 3.0)[1] == "many_units"
    assert recipe_for("instruction", None, 10, 3.0)[1] == "pretrained_head"


@pytest.mark.parametrize(("epsilon", "lora", "full"), [(3.0, 4e-3, 5e-4), (None, 2e-3, 3e-5)])
def test_lora_on_a_pretrained_head_has_a_rate_of_its_own(epsilon: float | None, lora: float, full: float) -> None:
    for adaptation, rate in ((None, lora), (Full(), full)):
        (phase,) = recipe_for("instruction", adaptation, 1000, epsilon)[0].phases
        assert phase.learning_rate == pytest.approx(rate)


@pytest.mark.parametrize(
    ("units", "epsilon", "adaptation"),
    [
        (999, 3.0, Head()),
        (1_000, 3.0, AttentiveHead(4)),
        (50_000, None, AttentiveHead(4)),
        (50_001, 0.5, AttentiveHead(4)),
        (50_001, 1.0, Lora()),
    ],
)
def test_auto_weighs_tokens_where_it_can(units: int, epsilon: float | None, adaptation: object) -> None:
    recipe, _ = _recipe(units=units, epsilon=epsilon, attentive=True, num_layers=6)
    assert recipe.phases[-1].adaptation == adaptation
    for task, weighs in (("text_regression", True), ("token_classification", False), ("masked_lm", False)):
        other, _ = recipe_for(task, None, 2000, 3.0, attentive=True, num_layers=6)
        assert isinstance(other.phases[-1].adaptation, AttentiveHead) == weighs


def test_the_measured_attentive_head() -> None:
    recipe, reason = _recipe(AttentiveHead(), num_layers=6, learning_rate_multiplier=2.0)
    (phase,) = recipe.phases
    assert (phase.sample_rate, phase.num_steps, phase.averaging, phase.noise_ratio) == (1 / 4, 120, 0.95, 1.0)
    assert (phase.learning_rate, phase.head_learning_rate, reason) == (0.04, 0.2, "requested")
    assert recipe.centring_noise_multiplier == 20.0
    for asked, depth, expected in ((None, 12, 8), (None, 1, 1), (None, 2, 1), (3, 12, 3), (9, 6, 6)):
        assert AttentiveHead(asked).of(depth) == AttentiveHead(expected)


def _reason(units: int, epsilon: float | None, task: str = "text_classification", **facts: object) -> str:
    known = {"attentive": True, "num_layers": 6, "layer_parameters": 1_774_464, **facts}
    recipe, reason = recipe_for(task, None, units, epsilon, **known)
    assert isinstance(recipe.main.adaptation, AttentiveLora) == (reason == "little_noise")
    return reason


@pytest.mark.parametrize(
    ("units", "epsilon", "reason"),
    [
        (6_920, 8.0, "little_noise"),
        (6_920, 7.2, "few_units"),  # fewer than 50,000 units · ε
        (14_000, 8.0, "little_noise"),
        (14_100, 8.0, "few_units"),  # longer than an hour
        (14_000, None, "few_units"),
        (900, 100.0, "few_units"),
    ],
)
def test_auto_adapts_the_blocks_too_where_little_noise_falls_on_them(
    units: int, epsilon: float | None, reason: str
) -> None:
    assert _reason(units, epsilon) == reason
    assert _reason(units, epsilon, "text_regression") == "few_units"
    assert _reason(units, epsilon, pairs=True) == "few_units"
    assert _reason(units, epsilon, attentive=False) == "few_units"
    for own in ({"n_epochs": 3}, {"batch_size": 32}, {"learning_rate_multiplier": 0.5}, {"as_measured": False}):
        assert _reason(units, epsilon, **own) == "few_units"
    assert _reason(units, epsilon, num_layers=24, layer_parameters=12_000_000) == "few_units"


def test_below_an_epsilon_of_one_it_stays_with_the_head() -> None:
    assert _reason(100_000, 0.6, num_layers=2, layer_parameters=198_272) == "small_epsilon"


def test_the_measured_lora_behind_an_attentive_head() -> None:
    recipe, reason = _recipe(AttentiveLora(rank=4), epsilon=8.0, num_layers=6, learning_rate_multiplier=2.0)
    warm, main, temperature = recipe.phases
    assert (warm.adaptation, main.adaptation, reason) == (AttentiveHead(4), AttentiveLora(4, rank=4), "requested")
    assert (temperature.adaptation, recipe.main) == (Temperature(), main)
    assert (warm.sample_rate, warm.num_steps, warm.noise_ratio) == (1 / 4, 100, 1.6)
    assert (warm.learning_rate, warm.head_learning_rate) == (0.02, 0.2)
    assert (main.sample_rate, main.num_steps, main.num_warmup_steps, main.averaging) == (1 / 2, 60, 10, 0.9)
    assert (main.learning_rate, main.head_learning_rate, main.noise_ratio) == (1.2e-2, 1e-2, 1.0)
    assert [part.name for part in recipe.parts(1.0)] == ["centring", "head", "main", "temperature"]


def test_the_temperature_behind_it_costs_next_to_nothing() -> None:
    recipe, _ = _recipe(AttentiveLora(), epsilon=8.0, num_layers=6)
    without = dataclasses.replace(recipe, phases=recipe.phases[:-1])
    scales = [calibrate(each.parts, 8.0, 1e-5).scale for each in (without, recipe)]
    assert scales[0] < scales[1] < 1.002 * scales[0]
    part = recipe.parts(2.0)[-1]
    assert isinstance(part, SampledGaussian)
    assert (part.sample_rate, part.num_steps, part.noise_multiplier) == (1.0, 30, 60.0)
    # Whatever the other phases are clipped to, and whether they tell their losses.
    other = dataclasses.replace(recipe, clipping="adaptive", max_grad_norm=0.1, loss_bound=1.0).parts(2.0)[-1]
    assert other == part == dataclasses.replace(part, clipping="flat", max_grad_norm=4.0, loss=None, quantile=None)


@pytest.mark.parametrize(
    ("units", "epsilon", "facts", "scaled"),
    [
        (1_250, 8.0, {}, True),
        (1_249, 8.0, {}, False),  # fewer than 10,000 units · ε
        (6_920, 1.0, {}, False),
        (6_920, None, {}, False),
        (6_920, 8.0, {"multi_label": True}, False),  # not measured
    ],
)
def test_where_a_temperature_follows(units: int, epsilon: float | None, facts: dict[str, bool], scaled: bool) -> None:
    recipe, _ = _recipe(AttentiveLora(), units, epsilon, num_layers=6, **facts)
    assert (recipe.phases[-1].adaptation == Temperature()) == scaled
    assert isinstance(recipe.main.adaptation, AttentiveLora)
    numbers, _ = recipe_for("text_regression", AttentiveLora(), units, epsilon, num_layers=6)
    assert numbers.phases[-1] == numbers.main


@pytest.mark.parametrize(("pairs", "num_layers"), [(False, 4), (True, 3)])
def test_the_measured_attentive_head_for_numbers(pairs: bool, num_layers: int) -> None:
    recipe, _ = recipe_for("text_regression", None, 5749, 3.0, attentive=True, pairs=pairs, num_layers=6)
    (phase,) = recipe.phases
    assert (phase.adaptation, phase.sample_rate, phase.num_steps) == (AttentiveHead(num_layers), 1 / 4, 120)
    assert (phase.learning_rate, phase.head_learning_rate) == (0.05, 0.03)
    assert AttentiveHead().of(6, pairs=True, pools=True) == AttentiveHead(6)
    assert AttentiveHead(5).of(6, pairs=True) == AttentiveHead(5)


@pytest.mark.parametrize(
    "kind", [kind for kind in ADAPTATIONS if kind not in ("head", "attentive_head", "attentive_lora")]
)
def test_beyond_the_head_a_warm_head_comes_first(kind: str) -> None:
    recipe, reason = _recipe(ADAPTATIONS[kind]())
    warm, main = recipe.phases
    assert (warm.adaptation, warm.num_steps, warm.noise_ratio) == (Head(), 80, 3.0)
    assert (main.adaptation.type, main.noise_ratio, reason) == (kind, 1.0, "requested")
    assert main.sample_rate * 6920 == pytest.approx(532, abs=1)
    assert main.num_steps == 52
    parts = {part.name: part for part in recipe.parts(2.0)}
    assert (parts["head"].noise_multiplier, parts["main"].noise_multiplier) == (6.0, 2.0)
    assert list(parts) == ["centring", "head", "main"]


@pytest.mark.parametrize("units", [1, 2, 7, 50, 99])
@pytest.mark.parametrize("adaptation", [Head(), BitFit()])
@pytest.mark.parametrize("epsilon", [None, 3.0])
def test_small_datasets_keep_sane_rates(units: int, adaptation: object, epsilon: float | None) -> None:
    for phase in _recipe(adaptation, units, epsilon)[0].phases:
        assert 0.0 < phase.sample_rate <= 1.0
        assert 1 <= phase.num_steps <= 200


def test_large_datasets_keep_a_bounded_batch() -> None:
    main = _recipe(Lora(), 10_000_000)[0].phases[-1]
    assert main.sample_rate * 10_000_000 == pytest.approx(4096)


def test_a_requests_numbers() -> None:
    phase = _recipe(n_epochs=3, batch_size=100, units=1000, learning_rate_multiplier=0.5)[0].phases[0]
    assert (phase.sample_rate, phase.num_steps, phase.learning_rate) == (0.1, 30, 0.05)
    warm, main = _recipe(Lora(), 1000, n_epochs=2, batch_size=1000, learning_rate_multiplier=2.0)[0].phases
    assert (warm.sample_rate, warm.num_steps, warm.learning_rate) == (1 / 8, 80, 0.2)
    assert (main.sample_rate, main.num_steps, main.learning_rate, main.head_learning_rate) == (1.0, 2, 2e-3, 1e-2)
    assert _recipe(batch_size=5000, units=1000)[0].phases[0].sample_rate == 1.0
    assert _recipe(n_epochs=1, batch_size=3, units=10)[0].phases[0].num_steps == 4  # ⌈1 / 0.3⌉


@pytest.mark.parametrize("bad", [{"units": 0}, {"n_epochs": 0}, {"batch_size": -1}, {"learning_rate_multiplier": 0.0}])
def test_numbers_that_make_no_sense(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        _recipe(**bad)
    with pytest.raises(KeyError):
        recipe_for("cooking", None, 10, 1.0)


@pytest.mark.parametrize("epsilon", [0.05, 0.3])
def test_a_small_epsilon_can_still_be_calibrated(epsilon: float) -> None:
    """The private mean's noise is fixed before calibration: it must leave room at any target."""
    recipe, _ = _recipe(epsilon=epsilon)
    calibrated = calibrate(recipe.parts, epsilon, 1e-5)
    assert calibrated.epsilon <= epsilon
    centring, head = calibrated.parts
    assert isinstance(centring, GaussianRelease)
    assert isinstance(head, SampledGaussian)
    assert centring.noise_multiplier >= 20.0 / epsilon


def test_without_privacy_nothing_is_clipped_or_noised() -> None:
    for part in _recipe(Lora(), epsilon=None)[0].parts(0.0):
        assert part.noise_multiplier == 0.0
        assert getattr(part, "clipping", "none") == "none"
