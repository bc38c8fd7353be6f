"""Which pretrained model to choose: an order of bases for a task, a number of people, an ε and a device.

The rule, and what it rests on, is docs/recipes.md, "Which base". In short: among the bases that can learn the task and
finish in an hour, trained for it before larger, larger before smaller; what would take longer comes after, the quickest
first. It reads only what is public.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from app.catalog.adaptations import AttentiveHead, AttentiveLora, Head, Temperature
from app.catalog.bases import BaseModel
from app.catalog.families import FAMILIES
from app.catalog.memory import trained_parameters
from app.catalog.recipes import Phase, recipe_for

Device = Literal["cpu", "cuda"]

#: Floating-point operations a second that training reaches: two CPU cores, as measured; one data-centre GPU, assumed
#: at a tenth of what its float32 tensor cores promise.
FLOPS: dict[Device, float] = {"cpu": 1e11, "cuda": 4e13}

#: Tokens of a text, where nobody knows better.
TOKENS = 64

#: What a user waits for.
SECONDS = 3600.0

#: Codes of reasons, the best first.
REASONS = ("sentence_encoder", "chat_tuned", "largest_in_time", "smaller", "too_slow")


@dataclass(frozen=True, slots=True)
class Recommendation:
    """rank: from 1. reason: one of `REASONS`. adaptation: what `auto` would pick. seconds: roughly, on that device."""

    base: BaseModel
    rank: int
    reason: str
    adaptation: str
    seconds: float


def recommend(
    bases: Iterable[BaseModel],
    task: str,
    num_units: int,
    epsilon: float | None,
    device: Device,
    *,
    pairs: bool = False,
) -> list[Recommendation]:
    """The bases that can learn the task, best first. epsilon: None without privacy. pairs: whether a record has two
    texts. Raises KeyError and ValueError as `recipes.recipe_for` does."""
    tokens = 2 * TOKENS if pairs else TOKENS

    def described(base: BaseModel) -> tuple[tuple[int, int, float, str], BaseModel, float, bool, str]:
        family = FAMILIES[base.family]
        recipe, _ = recipe_for(
            task,
            None,
            num_units,
            epsilon,
            lora=family.lora,
            attentive=family.attentive,
            pairs=pairs,
            num_layers=base.num_layers,
            layer_parameters=base.layer_parameters,
            pools=base.pools,
        )
        last = recipe.main.adaptation
        seconds = sum(_operations(base, phase, num_units, tokens) for phase in recipe.phases) / FLOPS[device]
        # Its work `auto` has bounded itself, for shorter texts than TOKENS.
        in_time = seconds <= SECONDS or isinstance(last, AttentiveLora)
        special = _made_for(base, task, isinstance(last, Head | AttentiveHead | AttentiveLora))
        adaptation = last.type
        size = -float(base.parameters) if in_time else seconds
        return (0 if in_time else 1, 0 if special and in_time else 1, size, base.id), base, seconds, special, adaptation

    ordered = sorted((described(base) for base in bases if task in base.tasks), key=lambda each: each[0])
    found: list[Recommendation] = []
    for rank, ((slow, _, _, _), base, seconds, special, adaptation) in enumerate(ordered, start=1):
        if slow:
            reason = "too_slow"
        elif special:
            reason = "chat_tuned" if FAMILIES[base.family].kind == "causal" else "sentence_encoder"
        else:
            reason = "smaller" if any(other.reason == "largest_in_time" for other in found) else "largest_in_time"
        found.append(Recommendation(base, rank, reason, adaptation, seconds))
    return found


def _made_for(base: BaseModel, task: str, on_features: bool) -> bool:
    """on_features: whether a head on frozen features is what the job learns with, or begins with."""
    if task in ("chat", "instruction"):
        return base.chat_template
    return base.sentence_encoder and on_features


def _operations(base: BaseModel, phase: Phase, num_units: int, tokens: int) -> float:
    """Two operations for each weight and token of a forward pass, as many again for gradients of activations, and for
    those of what trains; frozen features are computed once. tokens: of a record."""
    if isinstance(phase.adaptation, Head | AttentiveHead | Temperature):
        return 2.0 * base.parameters * tokens * num_units
    records = phase.num_steps * phase.sample_rate * num_units
    passed = base.parameters
    if isinstance(phase.adaptation, AttentiveLora):
        passed = base.layer_parameters * (phase.adaptation.num_layers or base.num_layers)
    return records * tokens * (4.0 * passed + 2.0 * trained_parameters(base, phase.adaptation))
