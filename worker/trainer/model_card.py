"""The bundle's README.md: a Hugging Face model card that says what the guarantee covers, and what it does not."""

from __future__ import annotations

import json
import math
from typing import Any

from app.catalog.adaptations import adaptation_to_dict
from app.catalog.families import GROUP_NORM_CODE
from app.catalog.recipes import CENTRING
from app.catalog.tasks import TASKS, Task
from app.privacy.plan import GaussianRelease, PrivacyPlan, SampledGaussian
from worker.trainer.spec import BaseSpec, TrainerSpec
from worker.trainer.tasks.interface import TrainerTask

_GROUP_NORM = """
GroupNorm stands in place of BatchNorm in the layers that `group_norm_layers` in `config.json` lists. transformers has
no class for that, so this folder brings one: read `{code}`, and let transformers run it by `trust_remote_code=True`;
without that the folder does not load."""


def model_card(
    spec: TrainerSpec, task: TrainerTask, metrics: dict[str, Any], step: int | None = None, *, code: bool = False
) -> str:
    """The card's text: metadata block, use, privacy statement, metrics that were released. step: of a checkpoint.

    code: whether the bundle brings a file of classes that transformers lacks.
    """
    kind = TASKS[spec.task.type]
    tags = [task.pipeline_tag, "privtune", *(["differential-privacy"] if spec.plan.mechanism == "dp_sgd" else [])]
    # JSON is YAML, and quotes every name that would not be plain text in it.
    metadata = {
        "license": "other" if spec.base.licence == "unknown" else spec.base.licence,
        "base_model": spec.base.id,
        "library_name": "transformers",
        "pipeline_tag": task.pipeline_tag,
        "tags": tags,
        "metrics": _told(metrics, kind),
    }
    front = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in metadata.items())
    classes = ", ".join(json.dumps(label, ensure_ascii=False) for label in spec.task.labels)
    said = f"Classes: {classes}. " if classes else ""
    return "\n".join(
        [
            f"---\n{front}\n---\n",
            f"# {spec.base.id}, fine-tuned: {kind.title.lower()}\n",
            said + " ".join(task.notes()) + "\n",
            f"```python\n{task.usage(', trust_remote_code=True' if code else '')}\n```\n",
            *([] if step is None else [_checkpoint(spec.plan, step)]),
            "## Privacy\n",
            *_privacy(spec.plan, metrics["released"]),
            *_lineage(spec.base),
            "## Training\n",
            *(
                f"- `{phase.name}`: {json.dumps(adaptation_to_dict(phase.adaptation))}, {phase.num_steps} steps, "
                f"sample rate {phase.sample_rate:.6g}, {phase.optimizer}, learning rate {phase.learning_rate:g}"
                for phase in spec.phases
            ),
            *_pooling(spec),
            *([_GROUP_NORM.format(code=GROUP_NORM_CODE)] if code else []),
            "\n## Evaluation\n",
            *_evaluation(task, metrics),
        ]
    )


def _told(metrics: dict[str, Any], kind: Task) -> list[str]:
    """Metrics by their usual names; of averages and their like all that was not withheld."""
    if metrics["released"] == "none":
        return []
    withheld = metrics.get("not_released", {})
    exact = [name for name in kind.public_metrics if name in metrics]
    return [name for name in kind.metrics if name not in withheld] + exact


def _checkpoint(plan: PrivacyPlan, step: int) -> str:
    whole = sum(part.num_steps for part in plan.parts)
    costs = (
        "; what follows is of the whole plan"
        if plan.mechanism == "none"
        else (
            ". What follows is of the whole plan: what the steps until here cost is less, and stands in "
            "`privacy_report.json`"
        )
    )
    return f"A **checkpoint**, taken at step {step} of {whole}{costs}.\n"


def _privacy(plan: PrivacyPlan, released: str) -> list[str]:
    if plan.mechanism == "none":
        return ["Trained **without** differential privacy, on data that was declared public.\n"]
    unit, column = "the record", plan.privacy_unit.column
    if column is not None:
        unit = f"all records with the same `{column}`, together"
    # Rounded up: a guarantee is never stated stronger than it was certified.
    epsilon = "not certified" if plan.epsilon is None else f"{math.ceil(plan.epsilon * 1e4) / 1e4:g}"
    covered = "weights and the metrics below are" if released == "private" else "weights are"
    lines = [
        f"(ε = {epsilon}, δ = {plan.target_delta:g})-differential privacy for {unit}, among {plan.num_units} units, "
        f"under the relation `{plan.neighboring_relation}` (a unit's records are replaced by nothing). "
        f"The model's {covered} what the guarantee covers.\n",
        "| part | rate | steps | noise multiplier | bound |",
        "|---|---|---|---|---|",
    ]
    for part in plan.parts:
        if isinstance(part, SampledGaussian):
            bound = f"{part.max_grad_norm:g}, {part.clipping} clipping"
            lines.append(
                f"| {part.name} | {part.sample_rate:.6g} | {part.num_steps} | {part.noise_multiplier:.6g} | {bound} |"
            )
        elif isinstance(part, GaussianRelease):
            lines.append(f"| {part.name} | 1 | 1 | {part.noise_multiplier:.6g} | {part.sensitivity:g} |")
    if any(isinstance(part, SampledGaussian) and part.loss is not None for part in plan.parts):
        lines.append(
            "\nClipped losses were noised together with each step's gradients, as one mechanism of that multiplier: "
            "the training loss in `metrics.json` (`train_loss_curve`) is covered, too."
        )
    if column is not None:
        lines.append(
            f"\nA step takes at most {plan.privacy_unit.max_records_per_unit} records of a unit, a random choice among "
            "its own, and clips the mean of their gradients once. How many records a unit has is protected."
        )
    lines += [
        f"\nAccountant: {plan.accountant or 'not stated'}. Batches were drawn by Poisson sampling, as accounted.\n",
        "Treated as public: the number of units, the list of classes (if there is one), the longest input, and every "
        "option of the job. "
        "Not covered: when the job ran, for how long, and whether it failed; people who are in other datasets too.\n",
        "The whole statement, signed by the service, is `privacy_report.json`; `privtune verify privacy_report.json` "
        "recomputes it offline.\n",
    ]
    return lines


def _lineage(base: BaseSpec) -> list[str]:
    if not base.lineage:
        return []
    lines = [
        "The base was trained by this service, too. People in its rows alone are covered by what its own job promised; "
        "people in the rows of several jobs by their composition, in `privacy_report.json` under `lineage`:\n"
    ]
    for entry in base.lineage:
        promise = "without privacy, on data declared public"
        if entry["mechanism"] != "none":
            promise = f"ε = {math.ceil(entry['epsilon'] * 1e4) / 1e4:g}, δ = {entry['delta']:g}"
        lines.append(f"- `{entry['model']}` (job `{entry['job']}`, from {entry['base_model']}): {promise}")
    return [*lines, ""]


_MEANS = " Averages are over units: each counts once, by the mean over its records."


def _pooling(spec: TrainerSpec) -> list[str]:
    if spec.plan.parts[0].name != CENTRING:
        return []
    released = " that was released with noise" if spec.plan.mechanism == "dp_sgd" else ""
    return [f"\nThe last layer of the encoder pools: it averages the tokens, and subtracts a mean vector{released}."]


def _evaluation(task: TrainerTask, metrics: dict[str, Any]) -> list[str]:
    if metrics["released"] == "none":
        return ["No metrics were released.\n"]
    means = _MEANS if metrics["averaged_over"] == "units" else ""
    told = f"{metrics['num_units']} units; {metrics['method']}.{means}\n"
    if set(metrics.get("not_released", ())) >= set(TASKS[task.spec.type].metrics):
        return [told, "The noise on so few units is as large as the metrics: none is told.\n"]
    withheld = {"public_data_only": "released on data declared public only", "noise": "not told, for the noise on it"}
    named = {
        why: [name for name, reason in metrics.get("not_released", {}).items() if reason == why] for why in withheld
    }
    missing = [f"- {', '.join(names)}: {withheld[why]}" for why, names in named.items() if names]
    return [told, *task.card(metrics), *missing, ""]
