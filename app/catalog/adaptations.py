"""How a pretrained model is adapted: which of its parameters a job trains.

A new adaptation is a dataclass and a line in `ADAPTATIONS` here (in `OF_PHASES` where no request names it, but recipes
add it), and one file in `worker/trainer/adaptations`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

#: What becomes of a base's BatchNorm: it stays as it came, or GroupNorm takes the place of each that would train.
BatchNorm = Literal["frozen", "group_norm"]


@dataclass(frozen=True, slots=True)
class Full:
    """Every weight."""

    type: ClassVar[str] = "full"
    batch_norm: BatchNorm = "frozen"


@dataclass(frozen=True, slots=True)
class Freeze:
    """Every weight but those whose names match one of the patterns, and the head.

    patterns: of names as they stand in the base's weights, `*` and `?` as in a shell, from the beginning of a name or
    from any of its dots: `embeddings.*` is of `bert.embeddings.word_embeddings.weight`, too.
    """

    type: ClassVar[str] = "freeze"
    patterns: tuple[str, ...] = ()
    batch_norm: BatchNorm = "frozen"

    def __post_init__(self) -> None:
        if len(self.patterns) > 64 or not all(1 <= len(pattern) <= 200 for pattern in self.patterns):
            raise ValueError("at most 64 patterns, each of 1 to 200 characters")

    def freezes(self, name: str) -> bool:
        """Whether one of the patterns is of this name."""
        return any(matches(pattern, name) for pattern in self.patterns)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of `Freeze` is of this name."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


@dataclass(frozen=True, slots=True)
class LastLayers:
    """The last `num_layers` blocks of the body, and the head."""

    type: ClassVar[str] = "last_layers"
    num_layers: int = 2
    batch_norm: BatchNorm = "frozen"

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError("num_layers must be at least 1")


@dataclass(frozen=True, slots=True)
class Head:
    """A new head on frozen features, which are computed once."""

    type: ClassVar[str] = "head"


@dataclass(frozen=True, slots=True)
class AttentiveHead:
    """A new head, and an attention that weighs the tokens for it, on the frozen states behind the base's first
    `num_layers` blocks, which are computed once; the blocks above are left out of the model.

    num_layers: None: two thirds of what the base has, of pairs of texts half; all, where its pooling layer stands
    behind them already.
    """

    type: ClassVar[str] = "attentive_head"
    num_layers: int | None = None

    def __post_init__(self) -> None:
        if self.num_layers is not None and self.num_layers < 1:
            raise ValueError("num_layers must be at least 1")

    def of(self, depth: int, *, pairs: bool = False, pools: bool = False) -> AttentiveHead:
        """With the number of blocks spelt out, for a base of so many. pairs: of texts. pools: see `BaseModel`."""
        return AttentiveHead(_blocks_read(self.num_layers, depth, pairs=pairs, pools=pools))


def _blocks_read(asked: int | None, depth: int, *, pairs: bool, pools: bool) -> int:
    usual = depth if pools else max(1, round(depth * (1 / 2 if pairs else 2 / 3)))
    return usual if asked is None else min(asked, depth)


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
        _require_factors(self.rank, self.alpha)


@dataclass(frozen=True, slots=True)
class AttentiveLora:
    """An attentive head, and then low-rank updates of every matrix of the blocks that it reads, together with it.

    num_layers: as of `AttentiveHead`. rank, alpha: as of `Lora`, but of each update only the factor that starts at zero
    trains (Sun et al. 2024). Merged on export.
    """

    type: ClassVar[str] = "attentive_lora"
    num_layers: int | None = None
    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        if self.num_layers is not None and self.num_layers < 1:
            raise ValueError("num_layers must be at least 1")
        _require_factors(self.rank, self.alpha)

    def of(self, depth: int, *, pairs: bool = False, pools: bool = False) -> AttentiveLora:
        """As `AttentiveHead.of`."""
        return dataclasses.replace(self, num_layers=_blocks_read(self.num_layers, depth, pairs=pairs, pools=pools))


#: Beyond, float32 has nothing left of the weights that the update is added to.
_LARGEST_ALPHA = 1e6


def _require_factors(rank: int, alpha: float) -> None:
    """Raises ValueError, for NaN too."""
    if rank < 1:
        raise ValueError("rank must be at least 1")
    if not 0.0 < alpha <= _LARGEST_ALPHA:
        raise ValueError(f"alpha must be greater than 0 and at most {_LARGEST_ALPHA:.0f}")


@dataclass(frozen=True, slots=True)
class BitFit:
    """The bias terms (Zaken et al. 2022), and the head."""

    type: ClassVar[str] = "bitfit"
    batch_norm: BatchNorm = "frozen"


@dataclass(frozen=True, slots=True)
class Temperature:
    """One number that scales the logits of what the phases before trained (Guo et al. 2017), and nothing else; folded
    into the head on export."""

    type: ClassVar[str] = "temperature"


Adaptation = Full | Freeze | LastLayers | Head | AttentiveHead | Lora | AttentiveLora | BitFit | Temperature

#: Those that a request may ask for.
ADAPTATIONS: dict[str, type[Adaptation]] = {
    cls.type: cls for cls in (Full, Freeze, LastLayers, Head, AttentiveHead, Lora, AttentiveLora, BitFit)
}


#: Those that a phase may have: recipes add what no request names.
OF_PHASES: dict[str, type[Adaptation]] = {**ADAPTATIONS, Temperature.type: Temperature}


def replaces_batch_norm(adaptation: Adaptation) -> bool:
    """Whether GroupNorm takes BatchNorm's place; never where the body is frozen."""
    return getattr(adaptation, "batch_norm", "frozen") == "group_norm"


def adaptation_to_dict(adaptation: Adaptation) -> dict[str, Any]:
    """JSON-ready: the type and the fields; `batch_norm` where it is replaced, since few bases have any."""
    fields = dataclasses.asdict(adaptation)
    if not replaces_batch_norm(adaptation):
        fields.pop("batch_norm", None)
    return {"type": adaptation.type, **{n: list(v) if isinstance(v, tuple) else v for n, v in fields.items()}}


def adaptation_from_dict(data: Mapping[str, Any]) -> Adaptation:
    """Raises KeyError on an unknown type, TypeError on an unknown field, ValueError on one out of range."""
    fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in data.items()}
    return OF_PHASES[fields.pop("type")](**fields)
