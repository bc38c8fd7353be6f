"""What a job optimises, phase by phase: the values between a request and its privacy plan, and the measured defaults.

A `Recipe` fixes everything but the noise multiplier; `Recipe.parts` gives the plan's parts for one, so that calibration
can search it. The defaults are measured on small datasets; they read only what is public (task, units, target ε).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from app.catalog.adaptations import (
    Adaptation,
    AttentiveHead,
    AttentiveLora,
    Head,
    LastLayers,
    Lora,
    Temperature,
    adaptation_from_dict,
    adaptation_to_dict,
)
from app.catalog.tasks import TASKS, HeadKind, Task
from app.privacy.plan import Clipping, GaussianRelease, LossSum, Part, QuantileSum, SampledGaussian

#: Names of the plan's parts.
CENTRING, HEAD_PHASE, MAIN_PHASE, EVALUATION = "centring", "head", "main", "evaluation"
TEMPERATURE_PHASE = "temperature"
PART_NAMES = frozenset({CENTRING, HEAD_PHASE, MAIN_PHASE, TEMPERATURE_PHASE, EVALUATION})

OptimizerName = Literal["adamw", "sgd", "dp_adam_bc"]
ScheduleName = Literal["constant", "linear", "cosine"]

#: What the loss curve takes of each step's privacy: 0.8 % more noise on the gradients, and on the sum of losses four
#: times their bound for each unit of the noise multiplier.
LOSS_SHARE = 1 / 64
#: The median, as in Andrew et al. 2021; the count takes as much as the loss does.
QUANTILE = QuantileSum(share=1 / 64, target_quantile=0.5, learning_rate=0.2)


def loss_bound(task_type: str, num_classes: int) -> float:
    """Where losses are clipped by default: the task's own, else twice the cross-entropy of a guess by chance."""
    own = TASKS[task_type].loss_bound
    return 2.0 * math.log(max(num_classes, 2)) if own is None else own


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of DP-SGD with one optimizer.

    name: also the name of the plan's part that it executes, step for step.
    learning_rate: of the adapted body (or of the head where only the head trains); head_learning_rate: of a new head.
    averaging: decay of the exponential moving average whose weights the phase ends with; None: the last weights.
    noise_ratio: this phase's noise multiplier over the main one.
    momentum: of sgd. schedule: of the learning rates, by step count only, after a linear warm-up of so many steps.
    max_grad_norm: gradients are clipped flat to it, and tell no loss, whatever the other phases do; None: the recipe's.
    """

    name: str
    adaptation: Adaptation
    sample_rate: float
    num_steps: int
    learning_rate: float
    head_learning_rate: float
    averaging: float | None = None
    noise_ratio: float = 1.0
    weight_decay: float = 0.0
    optimizer: OptimizerName = "adamw"
    momentum: float = 0.9
    schedule: ScheduleName = "constant"
    num_warmup_steps: int = 0
    max_grad_norm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` gives the same value back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**fields, "adaptation": adaptation_to_dict(self.adaptation)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Phase:
        """Raises KeyError, TypeError or ValueError on anything that `to_dict` did not write."""
        return cls(**{**data, "adaptation": adaptation_from_dict(data["adaptation"])})


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything about a job's training but the noise.

    centring_noise_multiplier: of the private mean of the frozen features; None: features are not centred.
    evaluation: the noised release of the metrics, calibrated to a share of its own; None: nothing private is released.
    loss_bound: where the losses of the loss curve are clipped; None: there is no curve.
    """

    phases: tuple[Phase, ...]
    clipping: Clipping
    max_grad_norm: float
    centring_noise_multiplier: float | None = None
    evaluation: GaussianRelease | None = None
    loss_bound: float | None = None

    @property
    def main(self) -> Phase:
        """See `main_phase`."""
        return main_phase(self.phases)

    def parts(self, noise_multiplier: float) -> tuple[Part, ...]:
        """The plan's parts, in the order of execution, at this main noise multiplier (0: a job that is not private)."""
        private = noise_multiplier > 0.0
        parts: list[Part] = []
        if self.centring_noise_multiplier is not None:
            parts.append(GaussianRelease(CENTRING, self.centring_noise_multiplier if private else 0.0, sensitivity=1.0))
        parts += [self._part(phase, noise_multiplier) for phase in self.phases]
        if self.evaluation is not None:
            parts.append(self.evaluation)
        return tuple(parts)

    def _part(self, phase: Phase, noise_multiplier: float) -> SampledGaussian:
        own = phase.max_grad_norm is not None
        clipping = "none" if noise_multiplier == 0.0 else "flat" if own else self.clipping
        return SampledGaussian(
            name=phase.name,
            sample_rate=phase.sample_rate,
            num_steps=phase.num_steps,
            noise_multiplier=noise_multiplier * phase.noise_ratio,
            max_grad_norm=phase.max_grad_norm or self.max_grad_norm,
            clipping=clipping,
            loss=None if own or self.loss_bound is None else LossSum(self.loss_bound, LOSS_SHARE),
            quantile=QUANTILE if clipping == "adaptive" else None,
        )


def main_phase(phases: Sequence[Phase]) -> Phase:
    """The phase that the job is about: the last that trains more than a temperature."""
    return [phase for phase in phases if phase.name != TEMPERATURE_PHASE][-1]


def main_part(parts: Sequence[Part]) -> SampledGaussian:
    """The part of a plan that `main_phase` executes."""
    return [part for part in parts if isinstance(part, SampledGaussian) and part.name != TEMPERATURE_PHASE][-1]


#: Up to so many units `auto` stays with a head on frozen features: seconds on a CPU, and no training of the body came
#: out above an attentive one but with little noise. Joint training of a body from a zero head is the main failure at
#: such sizes.
HEAD_UNITS = 20_000

#: From so many units on a head of `auto` on texts is attentive, and so it stays up to so many: minutes on a CPU.
#: Beyond what was measured (43,410 units), the body trains.
ATTENTIVE_UNITS, MOST_ATTENTIVE_UNITS = 1_000, 50_000

#: From so many units times ε on, `auto` adapts the blocks that an attentive head of single texts' classes reads, too:
#: the noise on a mean over units goes with the inverse of that product. Measured at 55,000, a gain; at 21,000 none of
#: both factors at rank 4.
LITTLE_NOISE = 50_000

#: At most so many units times weights of those blocks: an hour of one CPU core at 25 tokens a text.
MOST_WORK = 10**11

#: Below this ε `auto` stays with the head at any size: the noise falls on its few weights only.
HEAD_EPSILON = 1.0

# Head on frozen features. Results are flat in 10 to 40 epochs and in rates of 1/16 to 1/4.
_HEAD_SAMPLE_RATE, _HEAD_EPOCHS, _HEAD_LEARNING_RATE, _HEAD_AVERAGING = 1 / 8, 20, 0.2, 0.95
# Of numbers, and on tokens: see docs/recipes.md.
_REGRESSION_HEAD_LEARNING_RATE, _TOKEN_HEAD_LEARNING_RATE = 0.06, 1e-2
# The head and the tokens' scores together, from zero: flat in rates of 1/8 to 1, and in scores' rates of 0.02 to 0.05.
_ATTENTIVE_SAMPLE_RATE, _ATTENTIVE_EPOCHS = 1 / 4, 30
_SCORE_LEARNING_RATE = 0.02
_REGRESSION_SCORE_LEARNING_RATE, _REGRESSION_ATTENTIVE_LEARNING_RATE = 0.05, 0.03
# Of one class of several, flat clipping to so much of the features' length and half the rate: see docs/recipes.md,
# "Probabilities".
_CLASS_GRAD_NORM, _CLASS_HEAD_LEARNING_RATE = 0.3, 0.1
# The private mean's noise at ε of 1 and above; below, it keeps its share of the target.
_CENTRING_NOISE_MULTIPLIER = 20.0

# Beyond the head: a warm head first, at three times the noise (it raises the main phase's by 5 % at ε = 3).
_WARM_STEPS, _WARM_NOISE_RATIO = 80, 3.0
_MAIN_EPOCHS, _MAIN_HEAD_LEARNING_RATE = 4, 5e-3
_MAIN_SAMPLE_RATE, _MAX_EXPECTED_BATCH_SIZE = 1 / 13, 4096
# Measured for LoRA and BitFit; for whole layers the usual rate of DP-Adam (Li et al. 2022).
_PRIVATE_LEARNING_RATES = {"lora": 1e-3, "bitfit": 2e-3, "last_layers": 5e-4, "freeze": 5e-4, "full": 5e-4}
# Where the base brings its own head, LoRA at so many times either rate: see docs/recipes.md.
_PRETRAINED_LORA = 4.0

# Behind an attentive head: see docs/recipes.md.
_ATTENTIVE_WARM_STEPS, _ATTENTIVE_WARM_NOISE_RATIO = 100, 1.6
_ATTENTIVE_LORA_SAMPLE_RATE, _ATTENTIVE_LORA_EPOCHS, _ATTENTIVE_LORA_LEARNING_RATE = 1 / 2, 30, 6e-3
_ATTENTIVE_LORA_AVERAGING, _ATTENTIVE_LORA_WARMUP = 0.9, 6
# The temperature, behind it, on all units: see docs/recipes.md. A logarithm's gradient knows no scale of logits.
_TEMPERATURE_STEPS, _TEMPERATURE_NOISE_RATIO, _TEMPERATURE_GRAD_NORM = 30, 30.0, 4.0
_TEMPERATURE_LEARNING_RATE, _TEMPERATURE_AVERAGING = 1.0, 0.9
#: From so many units times ε on: with fewer, the noise on it could do more harm than the temperature mends.
TEMPERATURE_UNITS = 10_000

# Without noise small batches and the usual rates of fine-tuning (Devlin et al. 2019) do better.
_PUBLIC_LEARNING_RATES = {"lora": 5e-4, "bitfit": 1e-3, "last_layers": 5e-5, "freeze": 3e-5, "full": 3e-5}
_PUBLIC_HEAD_LEARNING_RATE, _PUBLIC_EXPECTED_BATCH_SIZE = 1e-3, 64


def recipe_for(
    task_type: str,
    adaptation: Adaptation | None,
    num_units: int,
    target_epsilon: float | None,
    *,
    n_epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate_multiplier: float | None = None,
    centred: bool = True,
    width: int = 1,
    lora: bool = True,
    attentive: bool = False,
    pairs: bool = False,
    multi_label: bool = False,
    clipping: Clipping | None = None,
    num_layers: int = 0,
    layer_parameters: int = 0,
    pools: bool = False,
    as_measured: bool = True,
) -> tuple[Recipe, str]:
    """The measured recipe, and why this adaptation: `requested`, `few_units`, `small_epsilon`, `little_noise`,
    `many_units` or `pretrained_head`.

    adaptation, n_epochs, batch_size, learning_rate_multiplier: None is the wire's `auto`. batch_size is the expected
    one, q · N; epochs become ⌈epochs / q⌉ steps; both are the main phase's. target_epsilon: None without privacy.
    centred: whether the job centres the base's pooled vectors. width: their squared norm, about: 1 where the base
    scales them. lora: whether the base has matrices for it (`app.catalog.families`). attentive: whether an attention
    can weigh its tokens. pairs: whether a record has two texts. multi_label: whether it has any number of the classes.
    clipping: the request's own; what is measured with another keeps to that.
    num_layers: the base's blocks; layer_parameters: of one; pools: whether all of them stay, see `BaseModel`.
    as_measured: whether optimizer and schedule are the recipe's own: others are meant for what they were tried with.
    The evaluation's release is the caller's to add. Raises KeyError on an unknown task, ValueError on a number that is
    not positive, or on a new head where the task has none.
    """
    task = TASKS[task_type]
    head = task.head
    if num_units < 1 or any(
        value is not None and value <= 0 for value in (n_epochs, batch_size, learning_rate_multiplier)
    ):
        raise ValueError("units, epochs, batch size and learning rate multiplier must be positive")
    if adaptation is not None:
        chosen, reason = adaptation, "requested"
    else:
        chosen, reason = _auto(head, num_units, target_epsilon, lora, attentive and head == "pooled")
        deeper = AttentiveLora().of(num_layers, pools=pools)
        work = num_units * layer_parameters * (deeper.num_layers or 0)
        measured = isinstance(chosen, AttentiveHead) and reason == "few_units" and task.labelled and not pairs
        untouched = as_measured and n_epochs is batch_size is learning_rate_multiplier is None
        if measured and untouched and num_units * (target_epsilon or 0.0) >= LITTLE_NOISE and 0 < work <= MOST_WORK:
            chosen, reason = deeper, "little_noise"
    if head == "pretrained" and isinstance(chosen, Head):
        raise ValueError("the task trains the base's own head: there is no new one")
    scale = 1.0 if learning_rate_multiplier is None else float(learning_rate_multiplier)
    head_scale = 1.0 / math.sqrt(width) if head == "pooled" else 1.0  # Adam's steps know no scale of inputs

    def sized(rate: float, epochs: int) -> tuple[float, int]:
        rate = rate if batch_size is None else min(1.0, batch_size / num_units)
        # A hair below, so that 20 / (1/8) is not 161 by rounding.
        return rate, max(1, math.ceil((epochs if n_epochs is None else n_epochs) / rate - 1e-9))

    one_class = head == "pooled" and task.labelled and not multi_label
    calibrated = one_class and isinstance(chosen, Head | AttentiveHead) and clipping in (None, "flat")
    if isinstance(chosen, Head):
        rate, steps = sized(_HEAD_SAMPLE_RATE, _HEAD_EPOCHS)
        phases: tuple[Phase, ...] = (_head_phase(rate, steps, _head_rate(task, calibrated) * head_scale * scale),)
    elif isinstance(chosen, AttentiveHead):
        rate, steps = sized(_ATTENTIVE_SAMPLE_RATE, _ATTENTIVE_EPOCHS)
        chosen = chosen.of(num_layers, pairs=pairs, pools=pools)
        phases = (_attentive_phase(task, calibrated, chosen, rate, steps, head_scale, scale),)
    elif isinstance(chosen, AttentiveLora):
        chosen = chosen.of(num_layers, pairs=pairs, pools=pools)
        rate, steps = sized(_ATTENTIVE_LORA_SAMPLE_RATE, _ATTENTIVE_LORA_EPOCHS)
        read = AttentiveHead(chosen.num_layers)
        warm = _attentive_phase(task, calibrated, read, _ATTENTIVE_SAMPLE_RATE, _ATTENTIVE_WARM_STEPS, head_scale)
        phases = (
            dataclasses.replace(warm, noise_ratio=_ATTENTIVE_WARM_NOISE_RATIO),
            Phase(
                name=MAIN_PHASE,
                adaptation=chosen,
                sample_rate=rate,
                num_steps=steps,
                learning_rate=_ATTENTIVE_LORA_LEARNING_RATE * scale,
                head_learning_rate=_MAIN_HEAD_LEARNING_RATE * head_scale * scale,
                averaging=_ATTENTIVE_LORA_AVERAGING,
                num_warmup_steps=steps // _ATTENTIVE_LORA_WARMUP,
            ),
        )
        if one_class and num_units * (target_epsilon or 0.0) >= TEMPERATURE_UNITS:
            phases += (_temperature_phase(),)
    else:
        private = target_epsilon is not None
        rate, steps = sized(_main_sample_rate(num_units, private), _MAIN_EPOCHS)
        rates = _PRIVATE_LEARNING_RATES if private else _PUBLIC_LEARNING_RATES
        factor = _PRETRAINED_LORA if head == "pretrained" and isinstance(chosen, Lora) else 1.0
        main = Phase(
            name=MAIN_PHASE,
            adaptation=chosen,
            sample_rate=rate,
            num_steps=steps,
            learning_rate=rates[chosen.type] * factor * scale,
            head_learning_rate=(_MAIN_HEAD_LEARNING_RATE if private else _PUBLIC_HEAD_LEARNING_RATE)
            * head_scale
            * scale,
        )
        warm = _head_phase(_HEAD_SAMPLE_RATE, _WARM_STEPS, _head_rate(task, calibrated) * head_scale)
        # A pretrained head is warm already.
        phases = (main,) if head == "pretrained" else (dataclasses.replace(warm, noise_ratio=_WARM_NOISE_RATIO), main)
    recipe = Recipe(phases, "automatic", 1.0)
    if calibrated:
        recipe = Recipe(phases, "flat", _CLASS_GRAD_NORM * math.sqrt(width))
    if head == "pooled" and centred:
        centring = _CENTRING_NOISE_MULTIPLIER / min(1.0, target_epsilon or 1.0)
        recipe = dataclasses.replace(recipe, centring_noise_multiplier=centring)
    return recipe, reason


def _auto(
    head: HeadKind, num_units: int, target_epsilon: float | None, lora: bool, attentive: bool
) -> tuple[Adaptation, str]:
    if head == "pretrained":
        return Lora(), "pretrained_head"
    best = AttentiveHead() if attentive and num_units >= ATTENTIVE_UNITS else Head()
    if num_units <= (MOST_ATTENTIVE_UNITS if attentive else HEAD_UNITS):
        return best, "few_units"
    if target_epsilon is not None and target_epsilon < HEAD_EPSILON:
        return best, "small_epsilon"
    return Lora() if lora else LastLayers(), "many_units"


def _head_rate(task: Task, calibrated: bool) -> float:
    """Pooled features are unit vectors; a token's are √width times as long."""
    if task.head != "pooled":
        return _TOKEN_HEAD_LEARNING_RATE
    if calibrated:
        return _CLASS_HEAD_LEARNING_RATE
    return _HEAD_LEARNING_RATE if task.labelled else _REGRESSION_HEAD_LEARNING_RATE


def _attentive_phase(
    task: Task,
    calibrated: bool,
    adaptation: AttentiveHead,
    sample_rate: float,
    num_steps: int,
    head_scale: float,
    scale: float = 1.0,
) -> Phase:
    of_head, of_scores = _REGRESSION_ATTENTIVE_LEARNING_RATE, _REGRESSION_SCORE_LEARNING_RATE
    if task.labelled:
        of_head, of_scores = _head_rate(task, calibrated), _SCORE_LEARNING_RATE
    phase = _head_phase(sample_rate, num_steps, of_head * head_scale * scale)
    return dataclasses.replace(phase, adaptation=adaptation, learning_rate=of_scores * scale)


def _temperature_phase() -> Phase:
    return Phase(
        name=TEMPERATURE_PHASE,
        adaptation=Temperature(),
        sample_rate=1.0,
        num_steps=_TEMPERATURE_STEPS,
        learning_rate=_TEMPERATURE_LEARNING_RATE,
        head_learning_rate=_TEMPERATURE_LEARNING_RATE,
        averaging=_TEMPERATURE_AVERAGING,
        noise_ratio=_TEMPERATURE_NOISE_RATIO,
        optimizer="sgd",
        momentum=0.0,
        max_grad_norm=_TEMPERATURE_GRAD_NORM,
    )


def _main_sample_rate(num_units: int, private: bool) -> float:
    if not private:
        return min(1.0, _PUBLIC_EXPECTED_BATCH_SIZE / num_units)
    return min(_MAIN_SAMPLE_RATE, _MAX_EXPECTED_BATCH_SIZE / num_units)


def _head_phase(sample_rate: float, num_steps: int, learning_rate: float) -> Phase:
    return Phase(HEAD_PHASE, Head(), sample_rate, num_steps, learning_rate, learning_rate, averaging=_HEAD_AVERAGING)
