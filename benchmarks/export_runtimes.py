"""Exports as their users run them: each answers batches of test rows in its own runtime."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from app.catalog.exports import EXPORT_FORMATS

Row = dict[str, Any]
Kind = Literal["texts", "images", "summaries"]

_CLASSES = {
    "texts": "AutoModelForSequenceClassification",
    "images": "AutoModelForImageClassification",
    "summaries": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True, slots=True)
class Answers:
    """told, right: classes of the rows, or (with a decoder) of each token of their targets, one behind the other."""

    told: Any
    right: Any

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.told == self.right))


def answers(kind: Kind, format_: str, folder: Path, base: Path | None, rows: list[Row], task: Any) -> Answers:
    """Of an export that was unpacked. base: the folder that an adapter is put on. task: the job's."""
    encode = _encoder(kind, folder, task)
    runtime = EXPORT_FORMATS[format_].runtime
    respond = _by_onnxruntime(kind, folder) if runtime == "onnxruntime" else _by_torch(kind, format_, folder, base)
    told, right = [], []
    for start in range(0, len(rows), 20):
        inputs, expected = encode(rows[start : start + 20])
        counts = expected >= 0
        told.append(respond(inputs).argmax(-1)[counts])
        right.append(expected[counts])
    return Answers(np.concatenate(told), np.concatenate(right))


def _encoder(kind: Kind, folder: Path, task: Any) -> Callable[[list[Row]], tuple[Any, Any]]:
    """Rows → inputs by name, and the classes that are right; -1 where none is."""
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer

    if kind == "images":
        processor = AutoImageProcessor.from_pretrained(folder)

        def images(rows: list[Row]) -> Any:
            pictures = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]
            pixels = processor(pictures, return_tensors="np")["pixel_values"].astype(np.float32)
            return {"pixel_values": pixels}, _classes(rows, task)

        return images
    tokenizer = AutoTokenizer.from_pretrained(folder)
    how: Any = {"padding": True, "truncation": True, "return_tensors": "np"}
    if kind == "texts":
        return lambda rows: (dict(tokenizer([row["text"] for row in rows], **how)), _classes(rows, task))

    def summaries(rows: list[Row]) -> Any:
        sources = [task["source_prefix"] + row["document"] for row in rows]
        read = tokenizer(sources, max_length=task["max_length"], **how)
        targets = tokenizer([row["summary"] for row in rows], max_length=task["max_target_length"], **how)
        ids = targets["input_ids"]
        begun = np.concatenate([np.zeros((len(rows), 1), ids.dtype), ids[:, :-1]], 1)  # T5 starts with padding, 0
        inputs = {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"], "decoder_input_ids": begun}
        return inputs, np.where(targets["attention_mask"] == 1, ids, -1)

    return summaries


def _classes(rows: list[Row], task: Any) -> Any:
    return np.array([task["labels"].index(row["label"]) for row in rows])


def _by_onnxruntime(kind: Kind, folder: Path) -> Callable[[Any], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def session(name: str) -> Any:
        return onnxruntime.InferenceSession(folder / name, options)

    if kind == "summaries":
        encoder, decoder = session("encoder_model.onnx"), session("decoder_model.onnx")

        def by_two(inputs: Any) -> Any:
            mask = inputs["attention_mask"]
            (read,) = encoder.run(None, {"input_ids": inputs["input_ids"], "attention_mask": mask})
            written = {"input_ids": inputs["decoder_input_ids"]}
            return decoder.run(["logits"], {**written, "encoder_hidden_states": read, "encoder_attention_mask": mask})[
                0
            ]

        return by_two
    model = session("model.onnx")
    names = [entry.name for entry in model.get_inputs()]
    return lambda inputs: model.run(None, {name: inputs[name] for name in names})[0]


def _by_torch(kind: Kind, format_: str, folder: Path, base: Path | None) -> Callable[[Any], Any]:
    import torch
    import transformers

    torch.set_num_threads(1)
    loader = getattr(transformers, _CLASSES[kind])
    if format_ == "adapter":
        from peft import PeftModel

        config = transformers.AutoConfig.from_pretrained(folder)
        model = PeftModel.from_pretrained(
            loader.from_pretrained(base, config=config, dtype=torch.float32), folder
        ).eval()
    else:
        model = loader.from_pretrained(folder, dtype="auto").eval()
    dtype = next(model.parameters()).dtype

    def respond(inputs: Any) -> Any:
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        if "pixel_values" in tensors:
            tensors["pixel_values"] = tensors["pixel_values"].to(dtype)
        with torch.inference_mode():
            return model(**tensors).logits.float().numpy()

    return respond
