"""The model that is exported, and what its exports are compared on: synthetic inputs, never a private row."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from worker.exporter.architectures import Answers, Kind, answers_with, kind_of, load
from worker.exporter.spec import ExportFailure
from worker.trainer.failure import TrainerFailure
from worker.trainer.tasks.interface import load_tokenizer, without_token

#: Synthetic inputs, and the longest in tokens. Of images, and of models that answer for each token, there are fewer.
ROWS, ROWS_PER_TOKEN, LONGEST, IMAGES = 128, 16, 24, 32

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The bundle, loaded: in float32, on the CPU. inputs: in the order of the model's `forward`, padded."""

    folder: Path
    kind: Kind
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    meaning: Answers
    inputs: Batch
    logits: Tensor

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """Raises ExportFailure `model_invalid` or `format_not_supported`."""
        kind = kind_of(folder)
        model = load(kind, folder, code="model_invalid", dtype=torch.float32)
        tokenizer = None
        if kind.inputs == "text":
            try:
                tokenizer = load_tokenizer(folder)
            except TrainerFailure as error:
                raise ExportFailure("model_invalid", str(error)) from error
        inputs = _synthetic(kind, model, tokenizer)
        return cls(folder, kind, model, tokenizer, answers_with(model), inputs, answer(model, inputs))

    def mask(self, inputs: Batch) -> Tensor | None:
        """The places that count, (rows, length): where the model answers for each token, those that are no padding."""
        if not self.kind.per_token:
            return None
        return inputs["decoder_attention_mask" if self.kind.decoder else "attention_mask"].bool()

    def encode(self, *texts: list[str]) -> Batch:
        """Texts, or pairs of them (with a decoder: sources and targets), as the model's inputs. Cut to the length that
        the bundle's tokenizer states."""
        assert self.tokenizer is not None
        return encode(self.model, self.tokenizer, *texts)


@torch.inference_mode()
def answer(model: Any, inputs: Batch, rows: int = 32) -> Tensor:
    """The model's logits for all inputs, some rows at a time."""
    size = len(next(iter(inputs.values())))
    pieces = [
        model(**{name: value[start : start + rows] for name, value in inputs.items()}).logits
        for start in range(0, size, rows)
    ]
    return torch.cat(pieces)


def encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *texts: list[str]) -> Batch:
    """Texts (or pairs) as tensors (rows, length), only those that the model's `forward` takes, in its order. With a
    decoder, pairs are sources and targets, and the decoder reads the targets moved by one."""
    limit = min(int(tokenizer.model_max_length), int(getattr(model.config, "max_position_embeddings", 512)))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    how: Any = {"truncation": True, "max_length": limit, "padding": True, "return_tensors": "pt"}
    if getattr(model.config, "is_encoder_decoder", False):
        sources, targets = texts
        encoded, written = tokenizer(sources, **how), tokenizer(text_target=targets, **how)
        start = torch.full((len(targets), 1), int(model.config.decoder_start_token_id or 0))
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "decoder_input_ids": torch.cat([start, written["input_ids"][:, :-1]], 1),
            "decoder_attention_mask": written["attention_mask"],
        }
    encoded = tokenizer(*texts, **how)
    if model.can_generate():  # as it was trained: GPT-2 would add them, where a tokenizer of BERT's tells them
        encoded.pop("token_type_ids", None)
    wanted = [name for name in inspect.signature(model.forward).parameters if name in encoded]
    return {name: encoded[name] for name in wanted}


def _synthetic(kind: Kind, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Batch:
    """The same on every call: random words of the vocabulary, of different lengths; images of noise."""
    generator = torch.Generator().manual_seed(20)
    if tokenizer is None:
        size = getattr(model.config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        channels = int(getattr(model.config, "num_channels", 3))
        return {"pixel_values": _images((IMAGES, channels, height, width), generator)}
    special = {*tokenizer.all_special_ids, *without_token(tokenizer, int(model.config.vocab_size))}
    size = min(int(model.config.vocab_size), int(getattr(model.config, "decoder_vocab_size", 1 << 60)))
    words = torch.tensor([index for index in range(size) if index not in special])
    words = words[words < len(tokenizer)]
    rows = ROWS_PER_TOKEN if kind.per_token else ROWS
    texts = []
    for row in range(rows):
        chosen = torch.randint(len(words), (2 + row % (LONGEST - 1),), generator=generator)
        texts.append(str(tokenizer.decode(words[chosen].tolist())))
    return encode(model, tokenizer, texts, *([texts[::-1]] if kind.decoder else []))


def _images(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Noise whose amplitude falls with frequency as 1/f, as in photographs (Field 1987), each image of deviation 1.

    White noise has too much in fine detail: to a net that was trained on photographs one image of it is like the other.
    """
    height, width = shape[2:]
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    frequency[0, 0] = frequency[frequency > 0].min()
    spectrum = torch.fft.rfft2(torch.randn(shape, generator=generator)) / frequency
    images: Tensor = torch.fft.irfft2(spectrum, s=(height, width))
    images /= images.std((1, 2, 3), keepdim=True)
    return images
