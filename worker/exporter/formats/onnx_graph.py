"""ONNX, by torch's exporter over `torch.export`, and its int8 form: by onnxruntime's dynamic quantization, convolutions
by weight alone."""

from __future__ import annotations

import ast
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from worker.exporter import card
from worker.exporter.architectures import load
from worker.exporter.formats import causal_graph, int8_convolutions, seq2seq_graphs, shared_weights
from worker.exporter.formats.maker import Made
from worker.exporter.formats.seq2seq_graphs import DECODER, ENCODER, LATER
from worker.exporter.reference import Batch, Reference
from worker.exporter.spec import ExportFailure, ExportSpec

GRAPH = "model.onnx"

#: One file holds less than 2 GiB: protobuf's limit. Larger weights lie beside the graph.
_LARGEST_GRAPH = 2**31 - 2**26

_USAGE = """```python
import onnxruntime
import transformers
{imports}
session = onnxruntime.InferenceSession("PATH_OF_THIS_FOLDER/model.onnx")
{prepare}
(logits,) = session.run(None, inputs)
print(logits.tolist())
```"""
_TEXT = """tokenizer = transformers.AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
encoded = tokenizer(%s, padding=True, truncation=True, return_tensors="np")
inputs = {name: encoded[name] for name in %s}"""
_TEXTS, _PAIRS = '["A text of yours."]', '["A text of yours."], ["The other one."]'
_IMAGE = """processor = transformers.AutoImageProcessor.from_pretrained("PATH_OF_THIS_FOLDER")
image = PIL.Image.open("PATH_OF_AN_IMAGE").convert("RGB")
inputs = dict(processor([image], return_tensors="np"))"""


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """name: of the file. sample: inputs by name, in the order in which the module takes them. outputs: their names.

    in_float: last names of modules that are computed in float32, with weights that are in int8 on the disk."""

    name: str
    module: nn.Module
    sample: Batch
    outputs: tuple[str, ...] = ("logits",)
    in_float: frozenset[str] = frozenset()

    @property
    def is_large(self) -> bool:
        return 4 * sum(parameter.numel() for parameter in self.module.parameters()) > _LARGEST_GRAPH


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
    """Float32 graphs; rows and tokens are free."""
    for graph in _graphs(reference):
        _export(graph, output / graph.name)
    _share(reference, output)
    return reload(reference, output, spec.threads)


def int8(folder: Path, spec: ExportSpec, reference: Reference, output: Path) -> Made:
    """Weights in int8, a scale for each channel. Activations are quantized as they come, but for those of convolutions
    and of modules `in_float`, which stay in float32."""
    (folder / "full").mkdir()
    logger = logging.getLogger()
    level = logger.level
    for graph in _graphs(reference):
        full = folder / "full" / graph.name
        in_float = _export(graph, full)
        if reference.kind.inputs == "image" or in_float:
            model = onnx.load(full)
            int8_convolutions.quantize_weights(model.graph, in_float)
            onnx.save(model, full, save_as_external_data=graph.is_large, location=f"{full.name}.data")
        logger.setLevel(logging.ERROR)  # advice about a preparation that torch's exporter has done already
        try:
            quantize_dynamic(
                full,
                output / graph.name,
                op_types_to_quantize=int8_convolutions.DYNAMIC,
                per_channel=True,
                use_external_data_format=graph.is_large,
                nodes_to_exclude=in_float,
            )
        except (ValueError, RuntimeError) as error:
            raise ExportFailure("export_check_failed", str(error)) from error
        finally:
            logger.setLevel(level)
    _share(reference, output)
    return reload(reference, output, spec.threads)


def _share(reference: Reference, output: Path) -> None:
    """Both graphs of a decoder have all its weights, but for those that make keys and values of what was read."""
    if reference.kind.decoder:
        shared_weights.share([output / DECODER, output / LATER])


def _graphs(reference: Reference) -> list[_Graph]:
    if reference.kind.decoder:
        # Of T5 fused attention cannot be exported with free lengths.
        model = load(
            reference.kind,
            reference.folder,
            code="model_invalid",
            dtype=torch.float32,
            attn_implementation="eager",
        )
        encoder, decoder = seq2seq_graphs.Encoder(model), seq2seq_graphs.Decoder(model)
        read, first, later = seq2seq_graphs.samples(encoder, decoder, reference.inputs)
        outputs, of_later = seq2seq_graphs.outputs(later)
        in_float = seq2seq_graphs.in_float(model)
        return [
            _Graph(ENCODER, encoder, read, ("last_hidden_state",), in_float),
            _Graph(DECODER, decoder, first, outputs, in_float),
            _Graph(LATER, seq2seq_graphs.LaterDecoder(model), later, of_later, in_float),
        ]
    if reference.kind.loader is AutoModelForCausalLM:
        sample = causal_graph.sample(reference.model, reference.inputs)
        return [_Graph(GRAPH, causal_graph.Cached(reference.model), sample, causal_graph.outputs(sample))]
    # A batch of one would be taken for a constant.
    sample = {name: value[:2] for name, value in reference.inputs.items()}
    cached = hasattr(reference.model.config, "use_cache") and reference.kind.per_token
    return [_Graph(GRAPH, _Logits(reference.model, list(sample), cached), sample)]


def _export(graph: _Graph, path: Path) -> list[str]:
    """Writes it; the names of its nodes that come from modules `in_float`. torch's exporter notes where each node is
    from, by lines of source and in which folder of this machine they are: that stays here."""
    free = torch.export.Dim.DYNAMIC
    # Of images the rows; of a cache's keys and values rows and length; else of rows and tokens.
    shapes = tuple(
        {0: free} if name == "pixel_values" else {0: free, 2: free} if value.dim() == 4 else {0: free, 1: free}
        for name, value in graph.sample.items()
    )
    takes_all = isinstance(graph.module, _Logits | causal_graph.Cached | seq2seq_graphs.LaterDecoder)
    try:
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.sample.values()),
            dynamo=True,
            input_names=list(graph.sample),
            output_names=list(graph.outputs),
            dynamic_shapes=(shapes,) if takes_all else shapes,
            verbose=False,
        )
        assert program is not None
        in_float = []
        for node in program.model.graph.all_nodes():
            scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
            if {scope.rpartition(".")[2] for scope in scopes} & graph.in_float:
                in_float.append(str(node.name))
            node.metadata_props.clear()
        program.save(path, external_data=graph.is_large)
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        raise ExportFailure("format_not_supported", f"{type(error).__name__}: {error}") from error
    return in_float


def reload(reference: Reference, output: Path, threads: int) -> Made:
    """The graphs in onnxruntime, on the CPU."""
    parameters = sum(parameter.numel() for parameter in reference.model.parameters())
    if reference.kind.decoder:
        encode, decode, later = (_Session(output / name, threads).run for name in (ENCODER, DECODER, LATER))

        def run(inputs: Batch) -> Tensor:
            return seq2seq_graphs.answer(encode, decode, later, inputs)

        return Made(run, seq2seq_graphs.usage(reference.model, card.prefix(reference.folder)), parameters)
    respond = _Session(output / GRAPH, threads)
    if reference.kind.loader is AutoModelForCausalLM:

        def read_on(inputs: Batch) -> Tensor:
            return causal_graph.answer(respond.run, respond.cached, inputs)

        return Made(read_on, causal_graph.USAGE, parameters)
    if reference.tokenizer is None:
        return Made(respond, _USAGE.format(imports="import PIL.Image\n", prepare=_IMAGE), parameters)
    texts = _PAIRS if '"text_pair"' in card.calls(reference.folder) else _TEXTS
    usage = _USAGE.format(imports="", prepare=_TEXT % (texts, sorted(respond.taken)))
    return Made(respond, usage, parameters)


class _Session:
    """A graph in onnxruntime. Raises ExportFailure `export_check_failed`."""

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        try:
            self._run = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            self.taken = {declared.name for declared in self._run.get_inputs()}
            self.cached = causal_graph.cached(self._run.get_inputs())
        except Exception as error:  # onnxruntime's errors share no base of their own
            raise ExportFailure("export_check_failed", f"{type(error).__name__}: {error}") from error

    def run(self, inputs: Batch) -> list[Tensor]:
        """All outputs, in the graph's order."""
        try:
            answers = self._run.run(None, {name: inputs[name].numpy() for name in inputs if name in self.taken})
        except Exception as error:
            raise ExportFailure("export_check_failed", f"{type(error).__name__}: {error}") from error
        return [torch.from_numpy(answer) for answer in answers]

    def __call__(self, inputs: Batch) -> Tensor:
        (answer,) = self.run(inputs)
        return answer
