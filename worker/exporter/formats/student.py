"""A smaller model of the same family, distilled on a file declared public (Hinton et al. 2015; DistilBERT, 2019).

The student begins as every so-manieth layer of the model, the last among them, and learns the model's own answers, as
soft targets, to public texts. The model saw private rows; the student sees what the model answers: post-processing.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from worker.exporter.architectures import Answers
from worker.exporter.formats.maker import Made
from worker.exporter.formats.weights import reload
from worker.exporter.reference import Reference, answer
from worker.exporter.spec import PUBLIC_FILE, ExportFailure, ExportSpec, StudentSpec

#: Rows of the public file: fewer teach nothing, more are not read. One in ten is held out, at most so many.
FEWEST_ROWS, MOST_ROWS, MOST_HELD_OUT = 40, 20_000, 1000

_BATCH, _LEARNING_RATE, _WARMUP, _TEMPERATURE = 16, 1e-4, 0.1, 2.0

#: Where families number their layers.
_LAYER = re.compile(r"\.(?:layer|layers|h|block|blocks)\.(\d+)\.")


def make(folder: Path, spec: ExportSpec, reference: Reference, output: Path) -> Made:
    """Raises ExportFailure `format_not_supported`, `data_mismatch`, `export_check_failed`."""
    assert spec.student is not None
    if reference.tokenizer is None or reference.kind.decoder:
        raise ExportFailure("format_not_supported", "no distillation for models of this kind")
    training, held_out = _texts(folder / PUBLIC_FILE, spec.student)
    student = drop_layers(reference.model, spec.student.num_layers)
    distil(reference, student, training, spec.student.n_epochs)
    student.save_pretrained(output, max_shard_size="100GB")
    made = reload(reference, output)
    if not torch.allclose(made.answer(reference.inputs), answer(student, reference.inputs), rtol=1e-4, atol=1e-5):
        raise ExportFailure("export_check_failed", "the reloaded student answers otherwise")
    told = {
        "num_layers": student.config.num_hidden_layers,
        "model_num_layers": reference.model.config.num_hidden_layers,
        "n_epochs": spec.student.n_epochs,
        "public_rows": len(training[0]),
    }
    return dataclasses.replace(made, figures=told, public=reference.encode(*held_out))


def _texts(path: Path, spec: StudentSpec) -> tuple[list[list[str]], list[list[str]]]:
    """The texts of each role, to train on and held out, a tenth of the rows."""
    roles = [role for role in ("text", "text_pair") if role in spec.columns]
    try:
        with path.open("rb") as file:
            table = pq.read_table(file, columns=[spec.columns[role] for role in roles])
        columns = [table.column(spec.columns[role]).to_pylist()[:MOST_ROWS] for role in roles]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ExportFailure("data_mismatch", str(error)) from error
    rows = [row for row in zip(*columns, strict=True) if all(isinstance(text, str) and text.strip() for text in row)]
    if len(rows) < FEWEST_ROWS:
        raise ExportFailure("data_mismatch", f"{len(rows)} rows with text")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    count = min(math.ceil(len(rows) / 10), MOST_HELD_OUT)
    held_out, training = ([rows[row] for row in chosen] for chosen in (order[:count], order[count:]))
    return [list(texts) for texts in zip(*training, strict=True)], [
        list(texts) for texts in zip(*held_out, strict=True)
    ]


def drop_layers(model: PreTrainedModel, num_layers: int | None) -> PreTrainedModel:
    """A copy of the model with that many of its layers, evenly spread; the last always stays (it may be the one that
    pools). Raises ExportFailure `format_not_supported` where layers are not numbered, or there are not more."""
    depth = getattr(model.config, "num_hidden_layers", None)
    wanted = math.ceil(depth / 2) if depth and num_layers is None else num_layers
    if not depth or not wanted or not 0 < wanted < depth:
        raise ExportFailure("format_not_supported", f"{num_layers} layers of {depth}")
    kept = sorted({round(place * (depth - 1) / max(wanted - 1, 1)) for place in range(wanted - 1)} | {depth - 1})
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    for name in ("layer_types",):  # one entry a layer, in families that have several kinds
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, [getattr(config, name)[index] for index in kept])
    student: Any = type(model)(config)
    place_of = {index: place for place, index in enumerate(kept)}
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        found = _LAYER.search(name)
        if found is None:
            weights[name] = value
        elif int(found[1]) in place_of:
            weights[f"{name[: found.start(1)]}{place_of[int(found[1])]}{name[found.end(1) :]}"] = value
    try:
        student.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ExportFailure("format_not_supported", str(error)) from error
    student.train(False)  # no dropout: its targets are the model's own answers, not labels
    made: PreTrainedModel = student
    return made


def distil(reference: Reference, student: PreTrainedModel, texts: list[list[str]], epochs: int) -> None:
    """Trains the student in place: AdamW, learning rate warmed up and let down to zero, no dropout, no noise."""
    torch.manual_seed(0)
    trained = _trainable(student)
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, weight_decay=0.01)
    rows = len(texts[0])
    steps = epochs * math.ceil(rows / _BATCH)
    warmup = max(1, round(_WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    scale = max(float(reference.logits.float().std()), 1e-6)  # of numbers, which may be in any unit
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        order = torch.randperm(rows, generator=generator).tolist()
        for start in range(0, rows, _BATCH):
            batch = reference.encode(*([column[row] for row in order[start : start + _BATCH]] for column in texts))
            target = answer(reference.model, batch).clone()
            loss = _loss(target, student(**batch).logits, reference.meaning, reference.mask(batch), scale)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    student.requires_grad_(False)


def _trainable(student: PreTrainedModel) -> list[nn.Parameter]:
    """All parameters but those of layers that were built by hand to pool (`worker.trainer.families.encoder`): they hold
    matrices that are zero or diagonal, and steps as large as the other layers need would wreck them."""
    student.requires_grad_(True)
    for name, module in student.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or weight is None or weight.shape[0] != weight.shape[1]:
            continue
        if torch.equal(weight, torch.diag(weight.diagonal())):
            layer = _LAYER.search(f"{name}.")
            student.get_submodule(name[: layer.end(1)] if layer else name).requires_grad_(False)
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


def _loss(target: Tensor, logits: Tensor, meaning: Answers, mask: Tensor | None, scale: float) -> Tensor:
    if mask is not None:
        target, logits = target[mask], logits[mask]
    if meaning == "number":
        return nn.functional.mse_loss(logits / scale, target / scale)
    if meaning == "labels":
        return nn.functional.binary_cross_entropy_with_logits(logits, torch.sigmoid(target))
    soft = torch.log_softmax(target / _TEMPERATURE, -1)
    ours = torch.log_softmax(logits / _TEMPERATURE, -1)
    return _TEMPERATURE**2 * nn.functional.kl_div(ours, soft, reduction="batchmean", log_target=True)
