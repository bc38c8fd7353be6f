"""ONNX, by torch's exporter over `torch.export`, and its int8 form by onnxruntime's dynamic quantization."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor, nn

from worker.exporter.formats.maker import Made
from worker.exporter.reference import Batch, Reference
from worker.exporter.spec import ExportFailure, ExportSpec

GRAPH = "model.onnx"

#: One file holds less than 2 GiB: protobuf's limit. Larger weights lie beside the graph.
_LARGEST_GRAPH = 2**31 - 2**26

_USAGE = """```python
import onnxruntime

session = onnxruntime.InferenceSession("PATH_OF_THIS_FOLDER/model.onnx")
{prepare}
(logits,) = session.run(None, inputs)
```"""
_TEXT = """tokenizer = transformers.AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
encoded = tokenizer(["…"], padding=True, truncation=True, return_tensors="np")
inputs = {name: encoded[name] for name in %s}"""
_IMAGE = 'inputs = {"pixel_values": pixels}  # (rows, channels, height, width), float32'


class _Logits(nn.Module):
    """The model's forward with its inputs by place, and nothing but logits out."""

    def __init__(self, model: nn.Module, names: list[str], cached: bool) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.options = {"use_cache": False} if cached else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Any = self.model(**dict(zip(self.names, inputs, strict=True)), **self.options)
        logits: Tensor = output.logits
        return logits


def plain(folder: Path, spec: ExportSpec, reference: Reference, output: Path) -> Made:
    """The float32 graph; rows and tokens are free."""
    _export(reference, output / GRAPH)
    return reload(reference, output, spec.threads)


def int8(folder: Path, spec: ExportSpec, reference: Reference, output: Path) -> Made:
    """Weights in int8, a scale for each channel; activations are quantized as they come."""
    full = folder / "full" / GRAPH
    full.parent.mkdir()
    _export(reference, full)
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # advice about a preparation that torch's exporter has done already
    try:
        quantize_dynamic(full, output / GRAPH, per_channel=True, use_external_data_format=_is_large(reference))
    except (ValueError, RuntimeError) as error:
        raise ExportFailure("export_check_failed", str(error)) from error
    finally:
        logger.setLevel(level)
    return reload(reference, output, spec.threads)


def _export(reference: Reference, path: Path) -> None:
    if not reference.kind.graph:
        raise ExportFailure("format_not_supported", "one graph does not hold this model")
    # A batch of one would be taken for a constant.
    sample = {name: value[:2] for name, value in reference.inputs.items()}
    names = list(sample)
    free = torch.export.Dim.DYNAMIC
    shapes = tuple({0: free} if name == "pixel_values" else {0: free, 1: free} for name in names)
    cached = hasattr(reference.model.config, "use_cache") and reference.kind.per_token
    try:
        program = torch.onnx.export(
            _Logits(reference.model, names, cached).eval(),
            tuple(sample.values()),
            dynamo=True,
            input_names=names,
            output_names=["logits"],
            dynamic_shapes=(shapes,),
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=_is_large(reference))
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        raise ExportFailure("format_not_supported", f"{type(error).__name__}: {error}") from error


def _is_large(reference: Reference) -> bool:
    return 4 * sum(parameter.numel() for parameter in reference.model.parameters()) > _LARGEST_GRAPH


def reload(reference: Reference, output: Path, threads: int) -> Made:
    """The graph in onnxruntime, on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(output / GRAPH, options, providers=["CPUExecutionProvider"])
        taken = {declared.name for declared in session.get_inputs()}
    except Exception as error:  # onnxruntime's errors share no base of their own
        raise ExportFailure("export_check_failed", f"{type(error).__name__}: {error}") from error

    def run(inputs: Batch) -> Tensor:
        try:
            (logits,) = session.run(None, {name: inputs[name].numpy() for name in inputs if name in taken})
        except Exception as error:
            raise ExportFailure("export_check_failed", f"{type(error).__name__}: {error}") from error
        return torch.from_numpy(logits)

    prepare = _IMAGE if reference.tokenizer is None else _TEXT % sorted(taken)
    parameters = sum(parameter.numel() for parameter in reference.model.parameters())
    return Made(run, _USAGE.format(prepare=prepare), parameters)
