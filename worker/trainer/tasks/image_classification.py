"""Image classification: an image, one of a declared list of classes.

Images are decoded batch by batch: what is kept of a dataset are its compressed bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, PreTrainedModel

from worker.trainer.failure import TrainerFailure
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.confusion import card_lines, confusion_cells, confusion_metrics
from worker.trainer.tasks.examples import Examples, Indices
from worker.trainer.tasks.interface import Batch, by_pipeline, on_device

#: Pixels that take as much of a physical batch as a token of text does.
_PIXELS_PER_TOKEN = 256


class ImageClassification:
    """The task, bound to one job's image processor and classes."""

    pipeline_tag: ClassVar[str] = "image-classification"

    def __init__(self, spec: TaskSpec, base: Path, max_length: int) -> None:
        self.spec = spec
        self.labels = spec.labels
        load: Any = AutoImageProcessor.from_pretrained
        try:
            self.processor = load(base, local_files_only=True, trust_remote_code=False)
            height, width = self._pixels(np.zeros((8, 8, 3), np.uint8)).shape[-2:]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainerFailure("base_model_invalid", str(error)) from error
        self._tokens = max(1, height * width // _PIXELS_PER_TOKEN)

    def encode(self, columns: Mapping[str, Sequence[Any]]) -> Examples:
        """Roles `image`: bytes of a PNG or JPEG, and `label`."""
        index = self.spec.class_index
        images, names = columns["image"], columns["label"]
        if not all(isinstance(image, bytes) for image in images) or not all(name in index for name in names):
            raise TrainerFailure("data_mismatch", "an image is missing or a label is not a declared class")
        labels = torch.tensor([index[name] for name in names], dtype=torch.int64)
        return self._examples([np.frombuffer(image, dtype=np.uint8) for image in images], labels)

    def _examples(self, images: list[Any], labels: Tensor) -> Examples:
        return Examples({"image": images}, {"labels": labels}, np.full(len(images), self._tokens, dtype=np.int64))

    def synthetic(self, model: PreTrainedModel, rows: int) -> Examples:
        """Images of noise, classes in turn."""
        random = np.random.default_rng(0)
        images = []
        for _ in range(rows):
            encoded = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(encoded, format="PNG")
            images.append(np.frombuffer(encoded.getvalue(), dtype=np.uint8))
        return self._examples(images, torch.arange(rows) % len(self.labels))

    def batch(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """pixel_values (rows, 3, height, width) float32, labels (rows,)."""
        pixels = []
        for row in rows:
            try:
                with Image.open(io.BytesIO(examples.sequences["image"][row].tobytes())) as image:
                    pixels.append(self._pixels(np.asarray(image.convert("RGB"))))
            except OSError as error:
                raise TrainerFailure("data_mismatch", "an image cannot be decoded") from error
        return on_device({"pixel_values": torch.stack(pixels)}, device) | self.targets(examples, rows, device)

    def _pixels(self, image: np.ndarray[Any, Any]) -> Tensor:
        # Said, since it is guessed otherwise: of 1, 3 or 4 rows of pixels as so many channels.
        values: Tensor = self.processor(image, return_tensors="pt", input_data_format="channels_last")["pixel_values"][
            0
        ]
        return values.to(torch.float32)

    def at_step(self, examples: Examples, rows: Indices, key: bytes) -> Examples:
        """As they are."""
        return examples

    def targets(self, examples: Examples, rows: Indices, device: torch.device) -> dict[str, Tensor]:
        """labels (rows,)."""
        return on_device({"labels": examples.tensors["labels"][torch.as_tensor(np.asarray(rows))]}, device)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, classes)."""
        logits: Tensor = model(batch["pixel_values"]).logits
        return logits.float()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(outputs, batch["labels"], reduction="none")

    def statistics(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The row's one cell of the confusion matrix, (rows, classes²)."""
        return confusion_cells(batch["labels"], outputs.argmax(1), len(self.labels))

    def metrics(self, totals: Tensor, num_units: int, noise_std: float = 0.0) -> dict[str, Any]:
        """Accuracy, precision, recall, F1."""
        classes = len(self.labels)
        return confusion_metrics(totals.view(classes, classes), num_units, noise_std)

    def card(self, metrics: Mapping[str, Any]) -> list[str]:
        """Accuracy with its interval, macro averages."""
        return card_lines(metrics)

    def prepare(self, model: PreTrainedModel) -> None:
        """Nothing."""

    def finish(self, head: nn.Module) -> None:
        """Nothing."""

    def public_metrics(self, model: PreTrainedModel, examples: Examples) -> dict[str, Any]:
        """None: nothing is generated."""
        return {}

    def notes(self) -> list[str]:
        """How images are scaled."""
        return ["Images are scaled as preprocessor_config.json says."]

    def usage(self, options: str = "") -> str:
        """By a pipeline."""
        return by_pipeline(self.pipeline_tag, options, '"PATH_OF_AN_IMAGE"')
