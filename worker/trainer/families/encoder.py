"""Classification models over an encoder of BERT's kind, with mean pooling built from their own layers.

Mean pooling is worth four points over the first token on sentence encoders, but `BertForSequenceClassification` reads
the first token, through a dense layer and a tanh, and a bundle must load without code of ours. So one more layer of the
encoder's own class is put behind the last one, with weights that make it the pooling that we want:

    attention  query = key = 0: every token attends uniformly to all unmasked ones; value = identity: their mean
    output     dense = RESIDUAL_SCALE · identity, so that the first token's own residual is one part in a thousand;
               LayerNorm without affine: √d times the unit vector of the mean (its component along 1 removed)
    FFN        weights 0, output bias = -√d · centre; LayerNorm: √d times the unit vector of the centred vector
    pooler     identity / √d, then tanh: a vector of norm at most 1, nearly the unit vector itself

What is trained is what is exported: nothing is approximated between the two. The pooling layer and the pooler stay
frozen in every adaptation, but for an attentive head's: there a query that is the same for all tokens meets one row of
the key, which trains (`attention.py`), so that the mean becomes a weighted one. The price is
one layer more at inference.

Where the pooler is followed by a ReLU instead of a tanh (DistilBERT), half of its outputs are a random projection of
the unit vector to half of its width, the other half the same with the other sign: a ReLU keeps one of each pair, so
that any linear function of the projection is still one of the head's, and inner products are those of the vectors up to
the projection's distortion (Johnson & Lindenstrauss 1984).

Dropout is off everywhere (the model is in evaluation mode throughout): noise regularises private training already, and
frozen features must not change from step to step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from worker.trainer.families.attention import AttentiveHead, SharedKey, pick_shared_row
from worker.trainer.families.loading import load_base, marker, name_classes, note
from worker.trainer.families.transformer import TransformerFamily
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.interface import text_inputs

#: A power of two: exact in every precision; and small enough for the product to stay finite in float16.
RESIDUAL_SCALE = 1024.0


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """Where such a model keeps its parts, as attribute paths.

    unmovable: softmax ignores a shift of all keys. position_offset: position embeddings that no token takes.
    stack: the blocks, below the body. Below a block: query, key, value, the attention's matrices; mixing, that of its
    outputs, and mixing_norm behind it; feed_forward, the second matrix of that layer, and the block's norm.
    rectified: the pooler is followed by a ReLU.
    """

    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    centres: ClassVar[bool] = True

    model_type: str
    body: str
    pooler: str
    head: str
    lora_targets: tuple[str, ...] = ("query", "value")
    unmovable: tuple[str, ...] = ("attention.self.key.bias",)
    position_offset: int = 0
    stack: str = "encoder.layer"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    mixing: str = "attention.output.dense"
    mixing_norm: str = "attention.output.LayerNorm"
    feed_forward: str = "output.dense"
    norm: str = "output.LayerNorm"
    rectified: bool = False

    def for_tokens(self) -> TransformerFamily:
        """The same body without a pooler, and a new head on every token."""
        return self._plain(AutoModelForTokenClassification, "classifier.")

    def for_masked_lm(self) -> TransformerFamily:
        """The same body, and the head that it was pretrained with."""
        return self._plain(AutoModelForMaskedLM, "")

    def _plain(self, auto_class: Any, head: str) -> TransformerFamily:
        return TransformerFamily(
            model_type=self.model_type,
            auto_class=auto_class,
            stacks=(f"{self.body}.{self.stack}",),
            head=head,
            lora_targets=self.lora_targets,
            unmovable=self.unmovable,
            position_offset=self.position_offset,
        )

    def max_length(self, model: PreTrainedModel) -> int:
        """Tokens that the position embeddings carry."""
        return int(model.config.max_position_embeddings) - self.position_offset

    def load(self, path: Path, task: TaskSpec, *, num_layers: int | None = None) -> PreTrainedModel:
        """The base, or its first `num_layers` blocks, with its pooling layer and a zero head, see `Family.load`.

        A base that a job of this service made has its pooling layer already, its centre included, and keeps all blocks.
        """
        grafted = continues = False

        def new(config: PreTrainedConfig) -> tuple[str, ...]:
            nonlocal grafted, continues
            continues = name_classes(config, task)
            grafted = bool(marker(config).get("pooling_layer"))
            if grafted:
                return (f"{self.head}.",)
            config.num_hidden_layers = min(num_layers or config.num_hidden_layers, config.num_hidden_layers) + 1
            note(config, pooling_layer=True)
            layer = f"{self.body}.{self.stack}.{config.num_hidden_layers - 1}."
            return (layer, f"{self.pooler}.", f"{self.head}.")

        model = load_base(path, self.auto_class, self.model_type, new=new)
        if not grafted:
            self._graft(model)
        if not continues:
            with torch.no_grad():
                for name in self.head_parameters(model):
                    model.get_parameter(name).zero_()
        return model

    @torch.no_grad()
    def _graft(self, model: PreTrainedModel) -> None:
        layer = self.pooling_layer(model)
        identity = torch.eye(model.config.hidden_size)
        for parameter in layer.parameters():
            parameter.zero_()
        layer.get_parameter(f"{self.value}.weight").copy_(identity)
        layer.get_parameter(f"{self.mixing}.weight").copy_(RESIDUAL_SCALE * identity)
        layer.get_parameter(f"{self.mixing_norm}.weight").fill_(1.0)
        layer.get_parameter(f"{self.norm}.weight").fill_(1.0)
        projection = _signed_halves(len(identity)) if self.rectified else identity
        model.get_parameter(f"{self.pooler}.weight").copy_(projection / math.sqrt(len(identity)))
        model.get_parameter(f"{self.pooler}.bias").zero_()

    def pooling_layer(self, model: nn.Module) -> nn.Module:
        """The layer that pools."""
        return self._stack(model)[-1]

    def head_parameters(self, model: nn.Module) -> list[str]:
        """The classifier's."""
        return [f"{self.head}.{name}" for name, _ in self.head_module(model).named_parameters()]

    def head_module(self, model: nn.Module) -> nn.Linear:
        """The classifier on the pooled vector."""
        head = model.get_submodule(self.head)
        assert isinstance(head, nn.Linear)
        return head

    def body_parameters(self, model: nn.Module, *, last_layers: int | None = None) -> list[str]:
        """Names of the base's own parameters, or of its last layers'; never the pooling layer's or the pooler's."""
        depth = len(self._stack(model)) - 1
        stack = f"{self.body}.{self.stack}."
        first = 0 if last_layers is None else max(0, depth - last_layers)
        kept = tuple(f"{stack}{index}." for index in range(first, depth))
        rest = () if last_layers is not None else (f"{self.body}.embeddings.",)
        return [name for name, _ in model.named_parameters() if name.startswith((*kept, *rest))]

    def pooled(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The mean vectors before centring, (rows, width), of norm √width up to rounding."""
        caught: list[Tensor] = []
        attention = self.pooling_layer(model).get_submodule(self.mixing_norm)
        hook = attention.register_forward_hook(lambda module, inputs, output: caught.append(output[:, 0]))
        try:
            model.get_submodule(self.body)(**text_inputs(batch))
        finally:
            hook.remove()
        return caught[0].float()

    def states(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """What the pooling layer reads, (rows, length, width)."""
        caught: list[Tensor] = []
        value = self.pooling_layer(model).get_submodule(self.value)
        hook = value.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
        try:
            model.get_submodule(self.body)(**text_inputs(batch))
        finally:
            hook.remove()
        return caught[0].float()

    def attend(self, model: PreTrainedModel) -> str:
        """Makes the pooling layer's key a shared one, at weights of zero where it pooled evenly; see `attention.py`."""
        layer, heads = self.pooling_layer(model), int(model.config.num_attention_heads)
        key, query = layer.get_submodule(self.key), layer.get_submodule(self.query)
        if isinstance(key, nn.Linear):
            assert isinstance(query, nn.Linear)
            pick_shared_row(query, heads)
            parent, _, child = self.key.rpartition(".")
            setattr(layer.get_submodule(parent), child, SharedKey(key, heads))
        place = f"{self.body}.{self.stack}.{len(self._stack(model)) - 1}"
        return f"{place}.{self.key}.score.weight"

    def attentive_head(self, model: nn.Module) -> AttentiveHead:
        """Scores, pooling and classifier of a model after `attend`."""
        layer = self.pooling_layer(model)
        key = layer.get_submodule(self.key)
        assert isinstance(key, SharedKey)

        def norm(mean: Tensor, first: Tensor) -> Tensor:
            pooled: Tensor = layer.get_submodule(self.mixing_norm)(RESIDUAL_SCALE * mean + first)
            return pooled

        return AttentiveHead(key.score, self.head_module(model), norm, partial(self.features, model))

    @torch.no_grad()
    def set_centre(self, model: nn.Module, centre: Tensor) -> None:
        """centre: (width,), the mean of the pooled vectors, each scaled to unit norm."""
        self.pooling_layer(model).get_parameter(f"{self.feed_forward}.bias").copy_(-math.sqrt(len(centre)) * centre)

    def features(self, model: nn.Module, pooled: Tensor) -> Tensor:
        """The head's inputs, (rows, width), from `pooled`: the rest of the pooling layer, and the pooler."""
        layer = self.pooling_layer(model)
        feed_forward = layer.get_submodule(self.feed_forward)
        assert isinstance(feed_forward, nn.Linear)
        nothing = pooled.new_zeros(len(pooled), feed_forward.in_features)  # what weights of 0 make of anything
        centred = layer.get_submodule(self.norm)(feed_forward(nothing) + pooled)
        projected: Tensor = model.get_submodule(self.pooler)(centred)
        return torch.relu(projected) if self.rectified else torch.tanh(projected)

    def _stack(self, model: nn.Module) -> nn.ModuleList:
        stack = model.get_submodule(f"{self.body}.{self.stack}")
        assert isinstance(stack, nn.ModuleList)
        return stack


def _signed_halves(width: int) -> Tensor:
    """(width, width): random signs scaled to keep norms, the same on every machine, and below them their negatives."""
    half = width // 2
    signs = 2.0 * torch.randint(2, (half, width), generator=torch.Generator().manual_seed(0)) - 1.0
    projection = signs / math.sqrt(max(half, 1))
    return torch.cat([projection, -projection, torch.zeros(width - 2 * half, width)])
