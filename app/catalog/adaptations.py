"""How a pretrained model is adapted: which of its parameters a job trains.

A new adaptation is a dataclass and a line in `ADAPTATIONS` here, and one file in `worker/trainer/adaptations`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Full:
    """Every weight."""

    type: ClassVar[str] = "full"


@dataclass(frozen=True, slots=True)
class LastLayers:
    """The last `num_layers` blocks of the body, and the head."""

    type: ClassVar[str] = "last_layers"
    num_layers: int = 2

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError("num_layers must be at least 1")


@dataclass(frozen=True, slots=True)
class Head:
    """A new head on frozen features, which are computed once."""

    type: ClassVar[str] = "head"


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank updates of the attention and feed-forward matrices (Hu et al. 2021), and the head; merged on export.

    targets: names of the matrices; empty: the family's own choice.
    """

    type: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError("rank and alpha must be positive")


@dataclass(frozen=True, slots=True)
class BitFit:
    """The bias terms (Zaken et al. 2022), and the head."""

    type: ClassVar[str] = "bitfit"


Adaptation = Full | LastLayers | Head | Lora | BitFit

ADAPTATIONS: dict[str, type[Adaptation]] = {cls.type: cls for cls in (Full, LastLayers, Head, Lora, BitFit)}


def adaptation_to_dict(adaptation: Adaptation) -> dict[str, Any]:
    """JSON-ready: the type and the fields."""
    return {"type": adaptation.type, **dataclasses.asdict(adaptation)}


def adaptation_from_dict(data: Mapping[str, Any]) -> Adaptation:
    """Raises KeyError on an unknown type, TypeError on an unknown field, ValueError on one out of range."""
    fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in data.items()}
    return ADAPTATIONS[fields.pop("type")](**fields)
