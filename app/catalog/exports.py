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

    runtime: what loads it, and what it is checked in. weights: the files that only this form has.
    max_relative_difference: how far the reloaded export's answers may lie from the model's, in units of how far the
      model's own answers lie from their mean (root mean squares): 0 is the same, 1 is what the best constant has.
    """

    type: str
    title: str
    runtime: str
    weights: tuple[str, ...]
    max_relative_difference: float


EXPORT_FORMATS: dict[str, ExportFormat] = {
    form.type: form
    for form in (
        ExportFormat("safetensors", "The model's own bundle", "transformers", ("model.safetensors",), 1e-3),
        ExportFormat(
            "adapter",
            "PEFT adapter: what LoRA changed, to be put on the base",
            "peft",
            ("adapter_config.json", "adapter_model.safetensors"),
            0.01,
        ),
        ExportFormat("fp16", "Weights in float16", "transformers", ("model.safetensors",), 0.05),
        ExportFormat("bf16", "Weights in bfloat16", "transformers", ("model.safetensors",), 0.25),
        ExportFormat("onnx", "ONNX graph, float32", "onnxruntime", ("model.onnx", "model.onnx.data"), 0.01),
        ExportFormat(
            "onnx_int8", "ONNX graph, int8 weights, dynamic", "onnxruntime", ("model.onnx", "model.onnx.data"), 0.6
        ),
        ExportFormat(
            "student", "Smaller model, distilled on public text", "transformers", ("model.safetensors",), 0.95
        ),
    )
}
