"""What kinds of models there are to an export, told by the bundle's own config.json: how one is loaded and answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

import worker.trainer.families.group_norm  # noqa: F401  (so that its classes are known)
from worker.exporter.spec import ExportFailure

Answers = Literal["classes", "labels", "number"]


@dataclass(frozen=True, slots=True)
class Kind:
    """suffixes: of architecture names in config.json. inputs: what it reads.

    per_token: whether it answers for each token. decoder: whether a decoder of its own writes what an encoder has read.
    """

    suffixes: tuple[str, ...]
    loader: Any
    inputs: Literal["text", "image"] = "text"
    per_token: bool = False
    decoder: bool = False


KINDS = (
    Kind(("ForSequenceClassification",), AutoModelForSequenceClassification),
    Kind(("ForTokenClassification",), AutoModelForTokenClassification, per_token=True),
    Kind(("ForMaskedLM",), AutoModelForMaskedLM, per_token=True),
    Kind(("ForCausalLM", "LMHeadModel"), AutoModelForCausalLM, per_token=True),
    Kind(("ForConditionalGeneration", "MTModel"), AutoModelForSeq2SeqLM, per_token=True, decoder=True),
    Kind(("ForImageClassification",), AutoModelForImageClassification, inputs="image"),
)


def kind_of(folder: Path) -> Kind:
    """Of the bundle in that folder. Raises ExportFailure `format_not_supported`."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (architecture,) = config["architectures"]
        return next(kind for kind in KINDS if architecture.endswith(kind.suffixes))
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ExportFailure("format_not_supported", f"no known architecture: {error}") from error


def load(kind: Kind, folder: Path, *, code: str = "export_check_failed", **options: Any) -> PreTrainedModel:
    """A model as plain transformers loads it, in evaluation mode. ExportFailure `code` where it does not, or where a
    weight of it is missing."""
    try:
        model: PreTrainedModel
        model, info = kind.loader.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ExportFailure(code, str(error)) from error
    if (info["missing_keys"] or info["mismatched_keys"]) and code != "base_model_invalid":
        raise ExportFailure(code, f"missing {info['missing_keys']}, mismatched {info['mismatched_keys']}")
    model.requires_grad_(False)
    model.train(False)
    return model


def answers_with(model: PreTrainedModel) -> Answers:
    """What the outputs mean: one of several classes, labels that are each true or not, or a number."""
    problem = getattr(model.config, "problem_type", None)
    if problem == "regression":
        return "number"
    return "labels" if problem == "multi_label_classification" else "classes"


def probabilities(logits: Tensor, meaning: Answers) -> Tensor:
    """(…, outputs), float32: probabilities, or the numbers themselves."""
    values = logits.float()
    if meaning == "number":
        return values
    return torch.sigmoid(values) if meaning == "labels" else torch.softmax(values, -1)
