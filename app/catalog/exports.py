"""The forms that a finished model is exported to, and what each may lose.

All of them are made from released weights: post-processing, which no budget is charged for.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What every record of an export says of its price.
POST_PROCESSING = (
    "Made from the model's released weights and from public inputs alone: post-processing of what the model's privacy "
    "report already covers, with no further epsilon. The report is the model's own, unchanged."
)


@dataclass(frozen=True, slots=True)
class ExportFormat:
    """A form of a model.

    runtime: what loads it, and what it is checked in. weights: the files that only this form may have (a model that
      reads with an encoder and writes with a decoder has three graphs). needed: sets of them, of which one must be
      there.
    max_relative_difference: how far the reloaded export's answers may lie from the model's, in units of how far the
      model's own answers lie from their mean (root mean squares): 0 is the same, 1 is what the best constant has.
    """

    type: str
    title: str
    runtime: str
    weights: tuple[str, ...]
    max_relative_difference: float
    needed: tuple[frozenset[str], ...]


_TENSORS = ("model.safetensors",)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_GRAPHS = ("model.onnx", "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")
#: Weights lie beside a graph where they are too large to be in it.
_GRAPH_FILES = (*_GRAPHS, *(f"{name}.data" for name in _GRAPHS))
_NEEDED_GRAPHS = (frozenset(_GRAPHS[:1]), frozenset(_GRAPHS[1:]))

EXPORT_FORMATS: dict[str, ExportFormat] = {
    form.type: form
    for form in (
        ExportFormat("safetensors", "The model's own bundle", "transformers", _TENSORS, 1e-3, (frozenset(_TENSORS),)),
        ExportFormat(
            "adapter",
            "PEFT adapter: what LoRA changed, to be put on the base",
            "peft",
            _ADAPTER,
            0.01,
            (frozenset(_ADAPTER),),
        ),
        ExportFormat("fp16", "Weights in float16", "transformers", _TENSORS, 0.05, (frozenset(_TENSORS),)),
        ExportFormat("bf16", "Weights in bfloat16", "transformers", _TENSORS, 0.25, (frozenset(_TENSORS),)),
        ExportFormat("onnx", "ONNX graph, float32", "onnxruntime", _GRAPH_FILES, 0.01, _NEEDED_GRAPHS),
        ExportFormat(
            "onnx_int8", "ONNX graph, int8 weights, dynamic", "onnxruntime", _GRAPH_FILES, 0.6, _NEEDED_GRAPHS
        ),
        ExportFormat(
            "student",
            "Smaller model, distilled on public text",
            "transformers",
            _TENSORS,
            0.95,
            (frozenset(_TENSORS),),
        ),
    )
}
