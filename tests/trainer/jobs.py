"""Job folders made by hand: a tiny random encoder, a toy dataset, a plan with known noise."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, RobertaConfig, RobertaModel

from app.catalog.adaptations import Adaptation, AttentiveLora, BitFit, Freeze, Full, Head, LastLayers, Lora
from app.catalog.families import FAMILIES
from app.catalog.recipes import EVALUATION, HEAD_PHASE, MAIN_PHASE, Phase, Recipe, recipe_for
from app.catalog.tasks import TASKS
from app.privacy.plan import Clipping, GaussianRelease, PrivacyPlan, PrivacyUnit
from worker.trainer.spec import BaseSpec, DataSpec, Evaluation, RuntimeOptions, TaskSpec, TrainerSpec

KEY = bytes(range(32))
#: `PRIVTUNE_TEST_DEVICE=cuda` runs every test that makes a job folder on a GPU.
DEVICE = os.environ.get("PRIVTUNE_TEST_DEVICE", "cpu")
GOOD, BAD, FILLER = ("good", "great", "fine"), ("bad", "awful", "poor"), ("the", "film", "is", "was", "a", "plot")
LABELS = ("negative", "positive")
NUM_ROWS, NUM_HELD_OUT = 60, 12
#: The recipes' own.
TEMPERATURE = recipe_for("text_classification", AttentiveLora(1), 10_000, 8.0, num_layers=2)[0].phases[-1]
CLASSIFICATION = TaskSpec("text_classification", {"text": "review", "label": "mood"}, LABELS, max_length=16)

ADAPTATIONS: dict[str, Adaptation] = {
    "head": Head(),
    "lora": Lora(rank=2, alpha=4.0),
    "bitfit": BitFit(),
    "last_layers": LastLayers(1),
    "freeze": Freeze(("embeddings.*", "encoder.layer.0.*.dense.*", "*.1.attention.self.query.weight")),
    "full": Full(),
}


def as_its_card_says(bundle: Path, **places: str) -> Any:
    """`run`, by the model card's own lines of Python, which call it; the call has said something. places: what the
    card leaves to its reader, beside the folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (bundle / "README.md").read_text(), re.DOTALL)
    for place, value in {"PATH_OF_THIS_FOLDER": str(bundle), **places}.items():
        assert place in code
        code = code.replace(place, value)
    assert code.splitlines()[-1].startswith("print(run(")
    defined: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, defined)
    assert said.getvalue()
    return defined["run"]


def make_base(folder: Path, family: str = "bert") -> Path:
    """A random two-layer encoder and its tokenizer, as plain transformers saves them."""
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32)
    torch.manual_seed(7)
    sizes: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 34,
        "initializer_range": 0.5,
    }
    model = (
        BertModel(BertConfig(**sizes))
        if family == "bert"
        else RobertaModel(RobertaConfig(**sizes, pad_token_id=0, bos_token_id=2, eos_token_id=3))
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int = NUM_ROWS) -> list[tuple[str, str]]:
    """(text, label): one telling word among fillers, of different lengths."""
    made = []
    for index in range(count):
        words = [FILLER[(index * 7 + place) % len(FILLER)] for place in range(1 + index % 6)]
        telling = GOOD if index % 2 else BAD
        words.insert(index % len(words), telling[(index // 2) % 3])
        made.append((" ".join(words), LABELS[index % 2]))
    return made


def phases_for(name: str, steps: int = 4) -> tuple[Phase, ...]:
    """A head alone, or a warm head and the adaptation behind it."""
    head = Phase(HEAD_PHASE, Head(), 0.5, steps, 0.2, 0.2, averaging=0.9)
    if name == "head":
        return (head,)
    main = Phase(MAIN_PHASE, ADAPTATIONS[name], 0.25, steps, 1e-2, 1e-2)
    return (dataclasses.replace(head, noise_ratio=3.0), main)


@dataclass(frozen=True)
class MadeJob:
    """A folder that is ready to run, and what is in its spec."""

    folder: Path
    spec: TrainerSpec

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.folder / "results/metrics.json").read_text())


def make_job(
    folder: Path,
    base: Path,
    *,
    adaptation: str = "head",
    private: bool = True,
    evaluation: Evaluation = "private",
    steps: int = 4,
    noise: float = 1.0,
    data: list[tuple[str, str]] | None = None,
    validation: list[tuple[str, str]] | None = None,
    family: str = "bert",
    phases: tuple[Phase, ...] | None = None,
    checkpoint_seconds: float = 1e6,
    tokens: int = 256,
    units: list[str] | None = None,
    validation_units: list[str] | None = None,
    num_held_out: int = NUM_HELD_OUT,
    max_records_per_unit: int = 4,
    task: TaskSpec = CLASSIFICATION,
    clipping: Clipping = "automatic",
    loss_bound: float | None = 2.0,
) -> MadeJob:
    """Writes a job folder. A validation file replaces the held-out split. units: the patient of each row of `data`."""
    data = rows() if data is None else data
    held_out = 0 if validation is not None or evaluation == "none" else num_held_out
    phases = phases or phases_for(adaptation, steps)
    centring = 5.0 if TASKS[task.type].head == "pooled" and FAMILIES[family].centred else None
    recipe = Recipe(phases, clipping, 1.0, centring_noise_multiplier=centring, loss_bound=loss_bound)
    if evaluation == "private":
        on = "training" if validation is None else "validation"
        bound = TASKS[task.type].sensitivity(len(task.labels), task.options)
        recipe = dataclasses.replace(recipe, evaluation=GaussianRelease(EVALUATION, 2.0, bound, dataset=on))
    plan = PrivacyPlan(
        mechanism="dp_sgd" if private else "none",
        num_units=(len(data) if units is None else len(set(units))) - held_out,
        parts=recipe.parts(noise if private else 0.0),
        target_epsilon=8.0 if private else None,
        target_delta=1e-5 if private else None,
        num_validation_units=held_out if validation is None else len(set(validation_units or range(len(validation)))),
        privacy_unit=PrivacyUnit() if units is None else PrivacyUnit("patient", max_records_per_unit),
    )
    spec = TrainerSpec(
        job_id="ftjob-test",
        task=task,
        base=BaseSpec("tiny", family, str(base)),
        phases=recipe.phases,
        plan=plan,
        data=DataSpec(len(data), held_out, validation is not None, len(validation or ())),
        evaluation=evaluation,
        dataset_digest="0" * 64,
        runtime=RuntimeOptions(device=DEVICE, threads=1, max_physical_batch_tokens=tokens),
        checkpoint_seconds=checkpoint_seconds,
    )
    (folder / "data").mkdir(parents=True)
    (folder / "results").mkdir()
    for name, content, patients in (("training", data, units), ("validation", validation, validation_units)):
        if content is not None:
            columns = {"review": [text for text, _ in content], "mood": [label for _, label in content]}
            if patients is not None:
                columns["patient"] = patients
            pq.write_table(pa.table(columns), folder / f"data/{name}.parquet")
    spec.write(folder)
    return MadeJob(folder, spec)
