"""How each format of the catalog is made."""

from __future__ import annotations

from worker.exporter.formats import adapter, onnx_graph, student, weights
from worker.exporter.formats.maker import Maker

MAKERS: dict[str, Maker] = {
    "safetensors": weights.bundle,
    "adapter": adapter.make,
    "fp16": weights.FP16,
    "bf16": weights.BF16,
    "onnx": onnx_graph.plain,
    "onnx_int8": onnx_graph.int8,
    "student": student.make,
}
