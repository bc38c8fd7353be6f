"""What an architecture is to the trainer, for one of transformers' model classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.trainer.families.attention import AttentiveHead
from worker.trainer.spec import TaskSpec


class Family(Protocol):
    """auto_class: transformers' AutoModelFor… that a bundle loads with.

    lora_targets: ends of the names of the matrices that LoRA updates by default (query and value: Hu et al. 2021).
    unmovable: ends of the names of parameters that never change the output: without noise they may stay as they were.
    """

    @property
    def auto_class(self) -> Any: ...

    @property
    def lora_targets(self) -> tuple[str, ...]: ...

    @property
    def unmovable(self) -> tuple[str, ...]: ...

    def load(self, path: Path, task: TaskSpec) -> PreTrainedModel:
        """The base, float32, on the CPU, in evaluation mode, nothing trainable yet; a new head starts at zero.

        Raises TrainerFailure `base_model_invalid`.
        """
        ...

    def max_length(self, model: PreTrainedModel) -> int:
        """Tokens that it reads at most."""
        ...

    def head_parameters(self, model: nn.Module) -> list[str]:
        """Names of the parameters that the base does not bring: trained in every phase, at the head's rate."""
        ...

    def body_parameters(self, model: nn.Module, *, last_layers: int | None = None) -> list[str]:
        """Names of the base's own parameters that may train, or of its last layers'."""
        ...


@runtime_checkable
class PooledFamily(Family, Protocol):
    """A body that gives one vector a record, and a linear head on it: frozen, it is computed once.

    centres: whether the vectors are centred by a released mean.
    """

    @property
    def centres(self) -> bool: ...

    def head_module(self, model: nn.Module) -> nn.Linear:
        """The head on the features."""
        ...

    def pooled(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The vectors before centring, (rows, width), float32."""
        ...

    def set_centre(self, model: nn.Module, centre: Tensor) -> None:
        """centre: (width,), the mean of the pooled vectors, each scaled to unit norm."""
        ...

    def features(self, model: nn.Module, pooled: Tensor) -> Tensor:
        """The head's inputs, (rows, width), from `pooled`."""
        ...


@runtime_checkable
class AttentiveFamily(PooledFamily, Protocol):
    """A pooled family whose vectors may be weighted means over tokens, with weights that are learnt."""

    def load(self, path: Path, task: TaskSpec, *, num_layers: int | None = None) -> PreTrainedModel:
        """See `Family.load`. num_layers: blocks of the base that are kept, all by default."""
        ...

    def attend(self, model: PreTrainedModel) -> str:
        """Adds the weights' parameter to the pooling, which gives what it gave before; its name."""
        ...

    def attentive_head(self, model: nn.Module) -> AttentiveHead:
        """(states, mask) → logits, after `attend`: it shares its parameters with the model."""
        ...

    def states(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """What the pooling reads, (rows, length, width), float32."""
        ...


@runtime_checkable
class TokenFamily(Family, Protocol):
    """A body that gives one vector a token, and a linear head on it: frozen, it is computed once, too."""

    def head_module(self, model: nn.Module) -> nn.Linear:
        """The head on a token's vector."""
        ...

    def token_vectors(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The head's inputs, (rows, length, width), float32."""
        ...
