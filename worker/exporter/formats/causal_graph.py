"""A causal language model as one graph that keeps what it has read: keys and values go in, and come out longer.

Inputs and outputs have the names that Optimum gives them (ORTModelForCausalLM), so that what loads those, loads these.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from worker.exporter.reference import Batch

#: Greedy decoding, to be run as it is.
USAGE = """```python
import numpy
import onnxruntime
import transformers

folder, texts, longest = "PATH_OF_THIS_FOLDER", ["…"], 128
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
caches = [taken for taken in session.get_inputs() if taken.name.startswith("past_key_values.")]

asked = tokenizer(texts, padding=True, return_tensors="np")
ids, mask = asked["input_ids"], asked["attention_mask"]
places = numpy.maximum(mask.cumsum(1) - 1, 0)
past = {taken.name: numpy.zeros((len(texts), taken.shape[1], 0, taken.shape[3]), "float32") for taken in caches}
written, ended = numpy.zeros((len(texts), 0), int), numpy.zeros(len(texts), bool)
while not ended.all() and written.shape[1] < longest:
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places, **past}
    logits, *present = session.run(None, inputs)
    token = numpy.where(ended, tokenizer.pad_token_id, logits[:, -1].argmax(1))
    ended |= token == tokenizer.eos_token_id
    written = numpy.concatenate([written, token[:, None]], 1)
    ids, places, past = token[:, None], places[:, -1:] + 1, dict(zip(past, present))
    mask = numpy.concatenate([mask, numpy.ones((len(texts), 1), int)], 1)
print(tokenizer.batch_decode(written, skip_special_tokens=True))
```

Chats are texts by `tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)`."""

_PAST, _PRESENT = "past_key_values.", "present."


class Cached(nn.Module):
    """Inputs by place, in the order of `sample`: input_ids (rows, new), attention_mask (rows, past + new), position_ids
    (rows, new), and for each layer a key and a value (rows, heads, past, width), where past may be 0 → logits (rows,
    new, vocabulary), and each key and value (rows, heads, past + new, width)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.takes_places = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask, position_ids, *past = inputs
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(list(zip(past[::2], past[1::2], strict=True))),
            use_cache=True,
            **({"position_ids": position_ids} if self.takes_places else {}),
        )
        return output.logits, *_states(output)


@torch.inference_mode()
def sample(model: Any, inputs: Batch) -> Batch:
    """Two rows of a reference's inputs, of which the first three tokens have been read."""
    ids, mask = inputs["input_ids"][:2], inputs["attention_mask"][:2]
    read = _states(model(input_ids=ids[:, :3], use_cache=True))
    names = [f"{_PAST}{layer}.{part}" for layer in range(len(read) // 2) for part in ("key", "value")]
    new = {"input_ids": ids[:, 3:], "attention_mask": mask, "position_ids": _places(ids)[:, 3:]}
    return {name: value.clone() for name, value in (new | dict(zip(names, read, strict=True))).items()}


def outputs(inputs: Batch) -> tuple[str, ...]:
    """Names of what the graph gives for inputs of these names."""
    return ("logits", *(_PRESENT + name.removeprefix(_PAST) for name in inputs if name.startswith(_PAST)))


def answer(run: Callable[[Batch], list[Tensor]], shapes: dict[str, tuple[int, int]], inputs: Batch) -> Tensor:
    """Logits of all tokens (rows, length, vocabulary), in two passes: the second reads what the first has kept.

    run: the graph. shapes: heads and width of each key and value that it takes."""
    ids, mask, places = inputs["input_ids"], inputs["attention_mask"], _places(inputs["input_ids"])
    half = ids.shape[1] // 2
    past = {name: torch.zeros(len(ids), heads, 0, width) for name, (heads, width) in shapes.items()}
    first, *kept = run(
        {"input_ids": ids[:, :half], "attention_mask": mask[:, :half], "position_ids": places[:, :half]} | past
    )
    past = dict(zip(past, kept, strict=True))
    second, *_ = run({"input_ids": ids[:, half:], "attention_mask": mask, "position_ids": places[:, half:]} | past)
    return torch.cat([first, second], 1)


def cached(declared: Any) -> dict[str, tuple[int, int]]:
    """Of a session's inputs, heads and width of each key and value."""
    return {each.name: (each.shape[1], each.shape[3]) for each in declared if each.name.startswith(_PAST)}


def _states(output: Any) -> list[Tensor]:
    """Key and value of each layer."""
    return [state for layer in output.past_key_values.layers for state in (layer.keys, layer.values)]


def _places(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand(len(ids), -1)
