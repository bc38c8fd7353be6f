"""A smaller model of the same family, distilled on a file declared public (Hinton et al. 2015; DistilBERT, 2019).

The student begins as every so-manieth layer of the model, the last among them, and learns the model's own answers, as
soft targets, to public texts. (Of a model that writes, they are its answers behind each token of the public targets;
encoder and decoder both lose layers, as in Shleifer & Rush 2020.) The model saw private rows; the student sees what the
model answers: post-processing.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.catalog import languages
from worker.exporter.architectures import Answers
from worker.exporter.formats.maker import Made
from worker.exporter.formats.weights import reload
from worker.exporter.reference import Reference, answer
from worker.exporter.spec import PUBLIC_FILE, ExportFailure, ExportSpec, StudentSpec

#: Of the public file's columns, in this order.
_ROLES = ("text", "text_pair", "source", "target", "source_lang", "target_lang")

#: Rows of the public file: fewer teach nothing, more are not read. One in ten is held out, at most so many.
FEWEST_ROWS, MOST_ROWS, MOST_HELD_OUT = 40, 20_000, 1000

_BATCH, _LEARNING_RATE, _WARMUP, _TEMPERATURE = 16, 1e-4, 0.1, 2.0

#: Where families number their layers, and of which of two stacks they are.
_LAYER = re.compile(r"\.(?:layer|layers|h|block|blocks)\.(\d+)\.")
_STACK = re.compile(r"(?:^|\.)(encoder|decoder)\.")

#: Keys of a config with the depth of each stack, by whichever a family has.
_DEPTHS = {"encoder": ("encoder_layers", "num_layers"), "decoder": ("decoder_layers", "num_decoder_layers")}

#: Lies in T5's first blocks, and is used by all.
_SHARED = "relative_attention_bias.weight"


def make(folder: Path, spec: ExportSpec, reference: Reference, output: Path) -> Made:
    """Raises ExportFailure `format_not_supported`, `student_not_smaller`, `data_mismatch`, `export_check_failed`."""
    assert spec.student is not None
    if reference.tokenizer is None:
        raise ExportFailure("format_not_supported", "no distillation for models of this kind")
    training, held_out = _texts(folder / PUBLIC_FILE, spec.student)
    student = drop_layers(reference.model, spec.student.num_layers)
    distil(reference, student, training, spec.student.n_epochs)
    student.save_pretrained(output, max_shard_size="100GB")
    made = reload(reference, output)
    if not torch.allclose(made.answer(reference.inputs), answer(student, reference.inputs), rtol=1e-4, atol=1e-5):
        raise ExportFailure("export_check_failed", "the reloaded student answers otherwise")
    told = {
        "num_layers": max(_depths(student).values()),
        "model_num_layers": max(_depths(reference.model).values()),
        "n_epochs": spec.student.n_epochs,
        "public_rows": len(training[0]),
    }
    return dataclasses.replace(made, figures=told, public=reference.encode(*held_out))


def _texts(path: Path, spec: StudentSpec) -> tuple[list[list[str]], list[list[str]]]:
    """The texts of each role, to train on and held out, a tenth of the rows; sources as the model was trained to read
    them, with the words that stand before them."""
    roles = [role for role in _ROLES if role in spec.columns]
    try:
        with path.open("rb") as file:
            table = pq.read_table(file, columns=[spec.columns[role] for role in roles])
        columns = [table.column(spec.columns[role]).to_pylist()[:MOST_ROWS] for role in roles]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ExportFailure("data_mismatch", str(error)) from error
    rows = [row for row in zip(*columns, strict=True) if all(isinstance(text, str) and text.strip() for text in row)]
    if spec.languages_of:
        rows = [(languages.prefix(spec.languages_of, *between) + read, said) for read, said, *between in rows]
    elif spec.source_prefix:
        rows = [(spec.source_prefix + read, *others) for read, *others in rows]
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
    pools). Of two stacks each keeps so many, or all, if it has not more. Raises ExportFailure `format_not_supported`
    where layers are not numbered, `student_not_smaller` where none would go."""
    depths = _depths(model)
    config = copy.deepcopy(model.config)
    kept = {stack: _kept(depth, num_layers) for stack, depth in depths.items()}
    if not depths:
        raise ExportFailure("format_not_supported", "no layers are numbered")
    if all(len(kept[stack]) == depth for stack, depth in depths.items()):
        raise ExportFailure("student_not_smaller", f"{num_layers} layers of {depths}")
    for stack, chosen in kept.items():
        setattr(config, _depth_key(config, stack), len(chosen))
    if getattr(config, "is_encoder_decoder", False) and "num_hidden_layers" in config.to_dict():
        config.num_hidden_layers = len(kept["encoder"])  # which BART has beside the depth of each
    for name in ("layer_types",):  # one entry a layer, in families that have several kinds
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, [getattr(config, name)[index] for index in kept[""]])
    student: Any = type(model)(config)
    _untie_as(model, student)
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        found, chosen = _LAYER.search(name), kept.get(_stack(name, kept), [])
        if found is None or name.endswith(_SHARED):
            weights[name] = value
        elif int(found[1]) in chosen:
            weights[f"{name[: found.start(1)]}{chosen.index(int(found[1]))}{name[found.end(1) :]}"] = value
    try:
        student.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ExportFailure("format_not_supported", str(error)) from error
    if student.can_generate():
        student.generation_config = copy.deepcopy(model.generation_config)
    student.train(False)  # no dropout: its targets are the model's own answers, not labels
    made: PreTrainedModel = student
    return made


def _untie_as(model: Any, student: Any) -> None:
    """A head of its own where the model has one: of T5's family the weights say that, and a config does not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding) and head.weight is not embedding.weight:
        student.get_output_embeddings().weight = nn.Parameter(head.weight.detach().clone())


def _kept(depth: int, wanted: int | None) -> list[int]:
    count = min(math.ceil(depth / 2) if wanted is None else wanted, depth)
    return sorted({round(place * (depth - 1) / max(count - 1, 1)) for place in range(count - 1)} | {depth - 1})


def _depths(model: PreTrainedModel) -> dict[str, int]:
    """Layers by stack: "" where there is one, else of encoder and decoder. None where the config does not say."""
    stacks = _DEPTHS if getattr(model.config, "is_encoder_decoder", False) else ("",)
    found = {stack: getattr(model.config, _depth_key(model.config, stack), None) for stack in stacks}
    return {stack: depth for stack, depth in found.items() if depth}


def _depth_key(config: Any, stack: str) -> str:
    return next((key for key in _DEPTHS.get(stack, ()) if hasattr(config, key)), "num_hidden_layers")


def _stack(name: str, stacks: Mapping[str, Any]) -> str:
    found = _STACK.search(name)
    return found[1] if found and "" not in stacks else ""


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
