"""Weights alone in int8, with a scale for each channel that they make: of convolutions, and of matrices whose inputs
lose too much.

onnxruntime's dynamic quantization has one scale for a whole convolution (its ConvInteger). Where BatchNorm is folded
into the weights, their channels differ by orders of magnitude, and the small ones are rounded away (Nagel et al. 2019,
https://arxiv.org/abs/1906.04721): it also runs several times slower than in float32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate

import numpy as np
import onnx
from onnx import helper, numpy_helper

#: Of a model's operators, those that onnxruntime's dynamic quantization is left.
DYNAMIC = ["MatMul", "Gather", "Attention", "EmbedLayerNormalization", "LSTM", "Transpose"]

#: Of the weights of convolutions, what may stay as it is: narrow layers, mostly the first, which few values pass,
#: so that roundings do not average out. Of EfficientNet-Lite0 that is 0.2 MB more.
_SPARED = 1 / 50


def quantize_weights(graph: onnx.GraphProto, matrices: Collection[str] = ()) -> None:
    """Replaces float32 weights by int8 in [-127, 127] times a scale for each channel out, the largest magnitude / 127:
    of each convolution, (channels out, channels in, …), and of products by these names, (in, out). Depthwise
    convolutions stay, and the smallest of the others: they are few, and lose the most.

    Cast and Mul, not DequantizeLinear: onnxruntime computes the first two once, when it loads the graph, and then
    arranges the weights as for a graph in float32. DequantizeLinear it keeps, and runs at half the speed.
    """
    by_name = {tensor.name: tensor for tensor in graph.initializer}
    channels = {name: axis for name, axis in _weights(graph, matrices) if by_name[name].dims[1] > 1}
    for name in _smallest({name: math.prod(by_name[name].dims) for name in channels if len(by_name[name].dims) > 2}):
        del channels[name]
    kept = [tensor for tensor in graph.initializer if tensor.name not in channels]
    nodes = []
    for name, channel in sorted(channels.items()):
        weights = numpy_helper.to_array(by_name[name])
        others = tuple(axis for axis in range(weights.ndim) if axis != channel)
        scales = np.abs(weights).max(axis=others, keepdims=True) / np.float32(127)
        scales[scales == 0] = 1
        steps = np.rint(weights / scales).astype(np.int8)
        kept += [numpy_helper.from_array(steps, f"{name}_int8"), numpy_helper.from_array(scales, f"{name}_scale")]
        nodes += [
            helper.make_node("Cast", [f"{name}_int8"], [f"{name}_steps"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}_steps", f"{name}_scale"], [name]),
        ]
    nodes += graph.node
    for field, values in ((graph.initializer, kept), (graph.node, nodes)):
        del field[:]
        field.extend(values)


def _smallest(sizes: Mapping[str, int]) -> list[str]:
    """Those that have together `_SPARED` of all at most."""
    names = sorted(sizes, key=lambda name: (sizes[name], name))
    together = accumulate(sizes[name] for name in names)
    return [name for name, size in zip(names, together, strict=True) if size <= _SPARED * sum(sizes.values())]


def _weights(graph: onnx.GraphProto, matrices: Collection[str]) -> Iterator[tuple[str, int]]:
    """Names of float32 initializers that convolutions and these products have as weights, and the axis of channels."""
    floats = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    for node in graph.node:
        if node.op_type == "Conv" and node.input[1] in floats:
            yield node.input[1], 0
        elif node.op_type == "MatMul" and node.name in matrices and node.input[1] in floats:
            if len(floats[node.input[1]].dims) == 2:
                yield node.input[1], 1
