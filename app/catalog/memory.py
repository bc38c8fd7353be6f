"""How much memory training takes, by the number of parameters: an estimate for choosing, not a promise.

The rule, in float32:
    weights       4 bytes for every parameter
    optimizer     16 for every parameter that trains: the noised sum, Adam's two moments, the averaged copy
    activations   one forward pass of the physical batch: for each token and block, about 17 · width numbers that
                  autograd keeps and 9 · width inputs and output gradients that clipping keeps (4 · width under LoRA
                  and BitFit, which need no inputs of the frozen matrices); a head on frozen features keeps one block's
    process       the runtime itself: Python, torch and transformers
"""

from __future__ import annotations

from app.catalog.adaptations import (
    ADAPTATIONS,
    Adaptation,
    AttentiveHead,
    AttentiveLora,
    BitFit,
    Freeze,
    Full,
    Head,
    LastLayers,
    Lora,
)
from app.catalog.bases import BaseModel

_WEIGHT, _TRAINED = 4, 16
_KEPT, _KEPT_FOR_CLIPPING, _KEPT_FOR_SMALL = 17, 9, 4
_PROCESS = 500 << 20
# Of all matrices of a block, in widths: four square ones, one to a width four times as long, and one back.
_OUTPUTS = 4 + 4 + 1


def trained_parameters(base: BaseModel, adaptation: Adaptation) -> int:
    """How many parameters train besides the head. Of LoRA: its usual two square matrices a block."""
    match adaptation:
        case Full() | Freeze():  # which patterns there will be is not known
            return base.parameters
        case LastLayers(num_layers):
            return min(num_layers, base.num_layers) * base.layer_parameters
        case Lora(rank):
            return base.num_layers * 2 * rank * 2 * base.hidden_size
        case AttentiveLora(rank=rank):
            return base.hidden_size * (1 + _read(base, adaptation) * rank * _OUTPUTS)
        case BitFit():
            return base.bias_parameters
        case AttentiveHead():
            return base.hidden_size
    return 0


def _read(base: BaseModel, adaptation: AttentiveLora) -> int:
    return adaptation.of(base.num_layers, pools=base.pools).num_layers or base.num_layers


#: The largest physical batch that a trainer chooses by itself. More is not faster: on a CPU products of this many rows
#: run at full speed already (benchmarks/RESULTS.md).
MOST_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}

#: A head on tokens keeps the vectors of so many; for the other rows that a step draws, the frozen body runs again. No
#: other choice hangs on it: of persons, how many rows there are is private.
MOST_FEATURE_BYTES = 2 << 30


def training_bytes(base: BaseModel, adaptation: Adaptation, batch_tokens: int) -> int:
    """batch_tokens: of one physical batch, padding included."""
    trained = trained_parameters(base, adaptation)
    blocks, kept = base.num_layers, _KEPT + _KEPT_FOR_CLIPPING
    match adaptation:
        case Head() | AttentiveHead():
            blocks = 1
        case LastLayers(num_layers):
            blocks = min(num_layers, base.num_layers)
        case Lora() | BitFit():
            kept = _KEPT + _KEPT_FOR_SMALL
        case AttentiveLora():
            blocks = _read(base, adaptation)
    activations = 4 * batch_tokens * base.hidden_size * blocks * kept
    return _PROCESS + _WEIGHT * base.parameters + _TRAINED * trained + activations


def training_bytes_by_adaptation(base: BaseModel, batch_tokens: int) -> dict[str, int]:
    """`training_bytes` of every adaptation, each with its defaults."""
    return {name: training_bytes(base, adaptation(), batch_tokens) for name, adaptation in ADAPTATIONS.items()}
