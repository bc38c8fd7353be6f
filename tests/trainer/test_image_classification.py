"""Image classification from a job folder to a bundle, on every family, at tiny size."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
)

from app.catalog.adaptations import Freeze, matches
from app.catalog.recipes import HEAD_PHASE, MAIN_PHASE, Phase
from tests.trainer.images import TASK, make_image_base, make_image_job, picture
from tests.trainer.jobs import ADAPTATIONS, KEY, MadeJob, as_its_card_says
from worker.trainer.control import Control
from worker.trainer.failure import TrainerFailure
from worker.trainer.run import run
from worker.trainer.tasks.image_classification import ImageClassification


@pytest.fixture(scope="module", params=["vit", "deit", "convnext", "resnet", "bit", "efficientnet"])
def images_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Family and folder."""
    family = str(request.param)
    folder = tmp_path_factory.mktemp("images") / family
    return family, make_image_base(folder, family)


def _job(folder: Path, base: tuple[str, Path], adaptation: str, steps: int, rate: float, **how: Any) -> MadeJob:
    main = Phase(MAIN_PHASE, ADAPTATIONS[adaptation], 0.5, steps, rate, rate)
    head = Phase(HEAD_PHASE, ADAPTATIONS["head"], 0.5, 2, 1e-2, 1e-2)
    phases = (dataclasses.replace(main, name=HEAD_PHASE),) if adaptation == "head" else (head, main)
    how = {"phases": phases, **how}
    return make_image_job(folder, base, **how)


@pytest.mark.parametrize("adaptation", ["head", "last_layers", "full"])
def test_a_private_job_gives_a_bundle_that_plain_transformers_loads(
    tmp_path: Path, images_base: tuple[str, Path], adaptation: str
) -> None:
    _, base = images_base
    job = _job(tmp_path / "job", images_base, adaptation, 3, 1e-2)
    run(job.folder, KEY, Control(None))
    assert job.metrics()["released"] == "private"
    bundle = job.folder / "results/model"
    assert {"preprocessor_config.json", "model.safetensors", "config.json"} <= {path.name for path in bundle.iterdir()}
    model, processor = (
        AutoModelForImageClassification.from_pretrained(bundle),
        AutoImageProcessor.from_pretrained(bundle),
    )
    answer = model(**processor(Image.open(io.BytesIO(picture(True, 1))), return_tensors="pt")).logits
    assert answer.shape == (1, 2)
    (tmp_path / "bright.png").write_bytes(picture(True, 1))
    called = as_its_card_says(bundle, PATH_OF_AN_IMAGE=str(tmp_path / "bright.png"))
    best = called(str(tmp_path / "bright.png"))[0]
    assert best["label"] == model.config.id2label[int(answer.argmax())]
    assert best["score"] == pytest.approx(float(answer.softmax(1).max().detach()), rel=1e-3)
    before, after = load_file(base / "model.safetensors"), load_file(bundle / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    body = {name for name in changed if "classifier" not in name}
    assert bool(body) == (adaptation != "head")
    if images_base[0] == "bit" and adaptation == "full":  # GroupNorm sees one image at a time: it trains
        assert {name for name in before if ".norm" in name and name.endswith((".weight", ".bias"))} <= changed
        return
    # Running statistics and BatchNorm's own weights are those of the base, and so are closed or open gates.
    untouched = ("running_", "num_batches", "normalization.", "batchnorm.", "_bn.", "_norm.", "squeeze_excite")
    assert not [name for name in changed if any(part in name for part in untouched)]


def test_without_noise_it_learns_the_task(tmp_path: Path, images_base: tuple[str, Path]) -> None:
    job = _job(tmp_path / "job", images_base, "head", 60, 0.05, private=False, evaluation="public")
    run(job.folder, KEY, Control(None))
    assert job.metrics()["accuracy"] >= 0.9


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_freezing_goes_by_the_names_in_the_file(tmp_path: Path, family: str) -> None:
    base = (family, make_image_base(tmp_path / "base", family))
    pattern = {"vit": "encoder.layer.0.*", "resnet": "embedder.*"}[family]  # transformers calls ViT's `layers.0` now
    before = load_file(base[1] / "model.safetensors")
    frozen = {name for name in before if matches(pattern, name)}
    assert frozen
    main = Phase(MAIN_PHASE, Freeze((pattern,)), 0.5, 3, 1e-2, 1e-2)
    job = _job(tmp_path / "job", base, "head", 2, 1e-2, phases=(main,))
    run(job.folder, KEY, Control(None))
    after = load_file(job.folder / "results/model/model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not changed & frozen
    assert any(".1." in name for name in changed)


def test_lora_on_a_vision_transformer(tmp_path: Path, images_base: tuple[str, Path]) -> None:
    family, base = images_base
    job = _job(tmp_path / "job", images_base, "lora", 2, 1e-2)
    if family in ("resnet", "bit", "efficientnet"):  # the service refuses such a plan before it comes here
        with pytest.raises(TrainerFailure, match="no matrices"):
            run(job.folder, KEY, Control(None))
        return
    run(job.folder, KEY, Control(None))
    after = load_file(job.folder / "results/model/model.safetensors")
    assert after.keys() == load_file(base / "model.safetensors").keys()


def test_what_is_no_image_is_a_mismatch_without_its_bytes(images_base: tuple[str, Path]) -> None:
    task = ImageClassification(TASK, images_base[1], 1)
    with pytest.raises(TrainerFailure, match="label"):
        task.encode({"image": ["text"], "label": ["dark"]})
    examples = task.encode({"image": [b"no image"], "label": ["dark"]})
    with pytest.raises(TrainerFailure) as refused:
        task.batch(examples, [0], torch.device("cpu"))
    assert refused.value.code == "data_mismatch"
    assert "no image" not in str(refused.value)


@pytest.mark.parametrize("size", [(10, 1), (10, 3), (10, 4), (3, 3), (1, 1), (512, 1), (1, 10)])
def test_an_image_of_few_rows_is_read_as_any_other(images_base: tuple[str, Path], size: tuple[int, int]) -> None:
    """Of one colour, so that its size, (width, height), changes nothing."""
    task = ImageClassification(TASK, images_base[1], 1)

    def pixels(size: tuple[int, int]) -> torch.Tensor:
        content = io.BytesIO()
        Image.new("RGB", size, (250, 120, 10)).save(content, "PNG")
        examples = task.encode({"image": [content.getvalue()], "label": [TASK.labels[0]]})
        return task.batch(examples, [0], torch.device("cpu"))["pixel_values"]

    torch.testing.assert_close(pixels(size), pixels((20, 20)))
