"""A model that reads with an encoder and writes with a decoder, as two graphs: what was read is read once.

Files, inputs and outputs have the names that Optimum's exporter gave them, without the graph that keeps a cache: what
loads those, loads these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from worker.exporter.reference import Batch

ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"

#: Greedy decoding, to be run as it is.
_USAGE = """```python
import numpy
import onnxruntime
import transformers

folder, texts, longest = "PATH_OF_THIS_FOLDER", ["…"], 128
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
config = transformers.AutoConfig.from_pretrained(folder)
encoder = onnxruntime.InferenceSession(f"{folder}/encoder_model.onnx")
decoder = onnxruntime.InferenceSession(f"{folder}/decoder_model.onnx")

asked = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
mask = asked["attention_mask"]
(hidden,) = encoder.run(None, {"input_ids": asked["input_ids"], "attention_mask": mask})
written = numpy.full((len(texts), 1), config.decoder_start_token_id)
{forced}ended = numpy.zeros(len(texts), bool)
while not ended.all() and written.shape[1] <= longest:
    states = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
    (logits,) = decoder.run(None, {"input_ids": written, **states})
    logits[:, -1, config.pad_token_id] = -numpy.inf  # padding is never written
    token = numpy.where(ended, config.pad_token_id, logits[:, -1].argmax(1))
    ended |= token == config.eos_token_id
    written = numpy.concatenate([written, token[:, None]], 1)
print(tokenizer.batch_decode(written, skip_special_tokens=True))
```"""


#: Where a text begins with a token of its language.
_FORCED = "written = numpy.append(written, numpy.full_like(written, {token}), 1)  # the language to write\n"


def usage(model: Any) -> str:
    """The lines of Python that write with the graphs."""
    token = model.generation_config.forced_bos_token_id
    return _USAGE.replace("{forced}", "" if token is None else _FORCED.format(token=token))


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
    length) → logits (rows, target length, vocabulary). The whole is computed anew for each token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            use_cache=False,
        )
        logits: Tensor = output.logits
        return logits


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
    """And those of the decoder. read: what the encoder made of its own."""
    return {
        "input_ids": inputs["decoder_input_ids"],
        "encoder_hidden_states": read,
        "encoder_attention_mask": inputs["attention_mask"],
    }


@torch.inference_mode()
def samples(encoder: Encoder, inputs: Batch) -> tuple[Batch, Batch]:
    """Inputs of both graphs, two rows each, of different lengths: what is equal would be taken for the same."""
    few = {name: value[:2] for name, value in inputs.items()}
    if few["decoder_input_ids"].shape[1] == few["input_ids"].shape[1]:
        few["decoder_input_ids"] = few["decoder_input_ids"][:, :-1]
    read = encoder(**encoder_inputs(few)).clone()
    return encoder_inputs(few), decoder_inputs(few, read)
