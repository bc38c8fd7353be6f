"""Causal language modeling from a job folder to a bundle, and its loss against transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.catalog.recipes import MAIN_PHASE, Phase
from app.catalog.tasks import TASKS
from tests.trainer.causal import make_causal_base, sentences
from tests.trainer.jobs import ADAPTATIONS, KEY, as_its_card_says, make_job
from worker.trainer.control import Control
from worker.trainer.dp.step import TOLERANCE
from worker.trainer.families.registry import family_for
from worker.trainer.run import run
from worker.trainer.spec import TaskSpec
from worker.trainer.tasks.language_modeling import MAX_LOSS, LanguageModeling, loss_metrics

TASK = TaskSpec("language_modeling", {"text": "review"}, (), max_length=16)


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen2", "qwen3"])
def causal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Family and folder."""
    family = str(request.param)
    return family, make_causal_base(tmp_path_factory.mktemp("causal") / family, family)


def _phases(adaptation: str, steps: int, rate: float) -> tuple[Phase, ...]:
    return (Phase(MAIN_PHASE, ADAPTATIONS[adaptation], 0.5, steps, rate, rate),)


@pytest.mark.parametrize("adaptation", ["lora", "last_layers", "full", "bitfit"])
def test_a_private_job_gives_a_bundle_that_plain_transformers_loads(
    tmp_path: Path, causal: tuple[str, Path], adaptation: str
) -> None:
    family, base = causal
    if adaptation == "bitfit" and family in ("llama", "qwen3"):
        pytest.skip("the family has no bias terms")
    job = make_job(
        tmp_path / "job",
        base,
        family=family,
        task=TASK,
        phases=_phases(adaptation, 3, 1e-2),
        data=[(text, "") for text in sentences(60)],
    )
    run(job.folder, KEY, Control(None))
    got = job.metrics()
    assert got["released"] == "private"
    assert got["not_released"] == {"loss": "noise", "perplexity": "noise"}  # of 12 units
    assert 0.0 <= got["token_accuracy"] <= 1.0
    assert got["noise_std"] == pytest.approx(2.0 * 2.0**0.5 * (1 + TOLERANCE))
    bundle = job.folder / "results/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(bundle), AutoTokenizer.from_pretrained(bundle)
    asked = tokenizer("the cat", return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=3, min_new_tokens=3)
    assert answer.shape[1] == asked["input_ids"].shape[1] + 3
    assert as_its_card_says(bundle)("the cat", max_new_tokens=3)[0]["generated_text"].startswith("the cat")
    before, after = load_file(base / "model.safetensors"), load_file(bundle / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed
    assert all(".0." not in name for name in changed) == (adaptation == "last_layers")
    assert all(name.endswith(".bias") for name in changed) == (adaptation == "bitfit")
    assert ("embed" in str(changed) or "wte" in str(changed)) == (adaptation == "full")


def test_without_noise_it_learns_the_language(tmp_path: Path, causal: tuple[str, Path]) -> None:
    family, base = causal
    if family.startswith("qwen"):
        pytest.skip("a Llama to the trainer; transformers gives it another tokenizer than the words'")
    losses = []
    for steps in (1, 60):
        job = make_job(
            tmp_path / str(steps),
            base,
            family=family,
            task=TASK,
            private=False,
            evaluation="public",
            phases=_phases("full", steps, 2e-2),
            data=[(text, "") for text in sentences(80)],
        )
        run(job.folder, KEY, Control(None))
        losses.append(job.metrics())
    assert losses[1]["loss"] < 0.5 * losses[0]["loss"]
    assert losses[1]["token_accuracy"] > 0.7


def test_a_records_loss_is_transformers_own(causal: tuple[str, Path]) -> None:
    """One record at a time, without padding, against the library's shifted mean."""
    family, base = causal
    model = family_for(family, "language_modeling").load(base, TASK)
    task = LanguageModeling(TASK, base, 32)
    examples = task.encode({"text": [*sentences(5), "cat"]})
    batch = task.batch(examples, range(6), torch.device("cpu"))
    losses = task.loss(task.outputs(model, batch), batch)
    statistics = task.statistics(task.outputs(model, batch), batch)
    for row in range(6):
        ids = torch.from_numpy(np.asarray(examples.sequences["input_ids"][row]))[None]
        expected = model(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(losses[row], expected)
        assert float(statistics[row, 0]) == pytest.approx(float(expected) / MAX_LOSS, rel=1e-5)
    assert float(statistics.norm(dim=1).max()) <= 2.0**0.5
    # A record of one token predicts nothing.
    alone = examples.select([5])
    assert len(alone.sequences["input_ids"][0]) == 2  # the word, and the end of the text


def test_metrics_follow_from_the_sums() -> None:
    got = loss_metrics(torch.tensor([20.0, 60.0], dtype=torch.float64), 100)
    assert (got["loss"], got["token_accuracy"]) == (pytest.approx(2.0), 0.6)
    assert got["perplexity"] == pytest.approx(np.exp(2.0))
    assert got["loss_interval_95"][0] < 2.0 < got["loss_interval_95"][1]
    noised = loss_metrics(torch.tensor([-5.0, 300.0], dtype=torch.float64), 100, 5.0)
    assert (noised["loss"], noised["token_accuracy"]) == (0.0, 1.0)


def test_a_loss_that_the_noise_hides_is_not_told() -> None:
    """A tenth of 10 nats on either side, and half of all tokens."""
    sums = torch.tensor([30.0, 60.0], dtype=torch.float64)
    assert "not_released" not in loss_metrics(sums, 100, 5.0)
    hidden = loss_metrics(sums, 100, 5.2)
    assert hidden["not_released"] == {"loss": "noise", "perplexity": "noise"}
    assert hidden.keys() == {"not_released", "token_accuracy", "token_accuracy_interval_95"}
    assert loss_metrics(sums, 100, 26.0) == {"not_released": dict.fromkeys(TASKS[TASK.type].metrics, "noise")}
