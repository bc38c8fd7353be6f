"""A model that reads with an encoder and writes with a decoder, as three graphs: what was read is read once, and so is
what was written: the decoder's first step leaves keys and values, the graph of all later ones takes them.

Files, inputs and outputs have the names that Optimum's exporter gave them (ORTModelForSeq2SeqLM): what loads those,
loads these. Both decoders have the weights, in one file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from worker.exporter.reference import Batch

ENCODER, DECODER, LATER = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"

#: What a decoder's layer keeps: of the text so far, and of what was read.
_OWN = ("decoder.key", "decoder.value")
_KEPT = (*_OWN, "encoder.key", "encoder.value")

#: Greedy decoding, to be run as it is.
_USAGE = """```python
import numpy
import onnxruntime
import transformers

folder, texts, longest = "PATH_OF_THIS_FOLDER", ["…"], 128
{prefixed}tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
config = transformers.AutoConfig.from_pretrained(folder)
graphs = (f"{folder}/{name}_model.onnx" for name in ("encoder", "decoder", "decoder_with_past"))
encoder, decoder, later = map(onnxruntime.InferenceSession, graphs)

asked = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
mask = asked["attention_mask"]
(hidden,) = encoder.run(None, {"input_ids": asked["input_ids"], "attention_mask": mask})
written = numpy.full((len(texts), 1), config.decoder_start_token_id)
{forced}ended, past = numpy.zeros(len(texts), bool), {}
while not ended.all() and written.shape[1] <= longest:
    new, known = (written[:, -1:], past) if past else (written, {"encoder_hidden_states": hidden})
    session = later if past else decoder
    answers = session.run(None, {"input_ids": new, "encoder_attention_mask": mask, **known})
    given = {answer.name: value for answer, value in zip(session.get_outputs(), answers)}
    logits = given.pop("logits")[:, -1]
    past |= {name.replace("present", "past_key_values"): value for name, value in given.items()}
    logits[:, config.pad_token_id] = -numpy.inf  # padding is never written
    token = numpy.where(ended, config.pad_token_id, logits.argmax(1))
    ended |= token == config.eos_token_id
    written = numpy.concatenate([written, token[:, None]], 1)
print(tokenizer.batch_decode(written, skip_special_tokens=True))
```"""


#: Where sources begin with words.
_PREFIXED = "texts = [{prefix} + text for text in texts]\n"

#: Where a text begins with a token of its language.
_FORCED = "written = numpy.append(written, numpy.full_like(written, {token}), 1)  # the language to write\n"


def usage(model: Any, prefix: str) -> str:
    """Lines of Python that write with the graphs. prefix: what sources begin with, as a string of Python."""
    token = model.generation_config.forced_bos_token_id
    forced = "" if token is None else _FORCED.format(token=token)
    return _USAGE.replace("{forced}", forced).replace("{prefixed}", _PREFIXED.format(prefix=prefix) if prefix else "")


class Encoder(nn.Module):
    """input_ids, attention_mask (rows, length) → (rows, length, width)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        read: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return read


class Decoder(nn.Module):
    """input_ids (rows, target length), encoder_hidden_states (rows, length, width), encoder_attention_mask (rows,
    length) → logits (rows, target length, vocabulary), and of each layer the four of `_KEPT`, (rows, heads, target
    length or length, width)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
    ) -> tuple[Tensor, ...]:
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            use_cache=True,
        )
        cache = output.past_key_values
        layers = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        return output.logits, *(part for own, read in layers for part in (own.keys, own.values, read.keys, read.values))


class LaterDecoder(nn.Module):
    """Inputs by place: input_ids (rows, new), encoder_attention_mask (rows, length), and of each layer the four of
    `_KEPT` → logits (rows, new, vocabulary), and of each layer those of `_OWN`, longer by what is new."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        input_ids, mask, *kept = inputs
        own = DynamicCache(list(zip(kept[::4], kept[1::4], strict=True)))
        read = DynamicCache(list(zip(kept[2::4], kept[3::4], strict=True)))
        # Nothing of the encoder's states is used but their shape: each layer has its keys and values of them.
        width = int(self.model.config.hidden_size)
        states = kept[2].new_zeros(1, 1, 1).expand(*mask.shape, width)
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=input_ids,
            past_key_values=EncoderDecoderCache(own, read),
            use_cache=True,
        )
        layers = output.past_key_values.self_attention_cache.layers
        return output.logits, *(part for layer in layers for part in (layer.keys, layer.values))


def in_float(model: Any) -> frozenset[str]:
    """Last names of modules that lose too much in int8: the head, whose inputs spread the widest, and what transformers
    itself never halves (T5's `wo`)."""
    head = model.get_output_embeddings()
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module is head}
    return frozenset(names | {*(model._keep_in_fp32_modules or ())})


def encoder_inputs(inputs: Batch) -> Batch:
    """Of a reference's inputs, those of the encoder."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def decoder_inputs(inputs: Batch, read: Tensor) -> Batch:
    """And those of the decoder's first step. read: what the encoder made of its own."""
    return {
        "input_ids": inputs["decoder_input_ids"],
        "encoder_hidden_states": read,
        "encoder_attention_mask": inputs["attention_mask"],
    }


def outputs(sample: Batch) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of what both decoders give. sample: of the later one."""
    kept = [name.replace("past_key_values", "present") for name in sample if name.startswith("past_key_values")]
    return ("logits", *kept), ("logits", *(name for name in kept if name.endswith(_OWN)))


Run = Callable[[Batch], list[Tensor]]


def answer(encode: Run, decode: Run, later: Run, inputs: Batch) -> Tensor:
    """Logits of all targets (rows, target length, vocabulary): half of each by the first graph, the rest by the later
    one, from what the first has kept."""
    (read,) = encode(encoder_inputs(inputs))
    half = inputs["decoder_input_ids"].shape[1] // 2
    first, *kept = decode(decoder_inputs({**inputs, "decoder_input_ids": inputs["decoder_input_ids"][:, :half]}, read))
    second, *_ = later(_later_inputs(inputs, kept, half))
    return torch.cat([first, second], 1)


def _later_inputs(inputs: Batch, kept: list[Tensor], start: int) -> Batch:
    names = [f"past_key_values.{layer}.{part}" for layer in range(len(kept) // len(_KEPT)) for part in _KEPT]
    new = {"input_ids": inputs["decoder_input_ids"][:, start:], "encoder_attention_mask": inputs["attention_mask"]}
    return new | dict(zip(names, kept, strict=True))


@torch.inference_mode()
def samples(encoder: Encoder, decoder: Decoder, inputs: Batch) -> tuple[Batch, Batch, Batch]:
    """Inputs of all graphs, two rows each, of different lengths: what is equal would be taken for the same."""
    few = {name: value[:2] for name, value in inputs.items()}
    if few["decoder_input_ids"].shape[1] in (few["input_ids"].shape[1], few["input_ids"].shape[1] + 3):
        few["decoder_input_ids"] = few["decoder_input_ids"][:, :-1]
    read = encoder(**encoder_inputs(few)).clone()
    first = decoder_inputs(few, read)
    _, *kept = decoder(**{**first, "input_ids": first["input_ids"][:, :3]})
    return encoder_inputs(few), first, _later_inputs(few, [each.clone() for each in kept], 3)
