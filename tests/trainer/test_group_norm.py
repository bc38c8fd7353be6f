"""GroupNorm in place of BatchNorm: what it computes, what is replaced, and a bundle that loads without privtune."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from app.catalog.adaptations import Adaptation, BitFit, Freeze, Full, Head, LastLayers
from app.catalog.families import FAMILIES, GROUP_NORM_CODE
from app.catalog.parameters import trained_names
from app.catalog.recipes import HEAD_PHASE, MAIN_PHASE, Phase
from app.catalog.tasks import TASKS
from app.models.model_folder import inspect
from tests.trainer.images import answers_elsewhere, make_image_base, make_image_job, picture
from tests.trainer.jobs import KEY, MadeJob
from worker.trainer.control import Control
from worker.trainer.failure import TrainerFailure
from worker.trainer.families import modeling_group_norm
from worker.trainer.families.group_norm import with_group_norm
from worker.trainer.families.modeling_group_norm import GroupNorm, num_groups
from worker.trainer.families.registry import family_for
from worker.trainer.job import load_model
from worker.trainer.run import run

FULL = Full(batch_norm="group_norm")


def _base(folder: Path, family: str) -> Path:
    """With the statistics of some pretraining."""
    weights = load_file(make_image_base(folder, family) / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, value in weights.items():
        if name.endswith("running_mean"):
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        if name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["resnet", "efficientnet"])
def images_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Family and folder."""
    family = str(request.param)
    return family, _base(tmp_path_factory.mktemp("norms") / family, family)


def _job(folder: Path, base: tuple[str, Path], adaptation: Adaptation, steps: int = 3, **how: Any) -> MadeJob:
    head = Phase(HEAD_PHASE, Head(), 0.5, 2, 1e-2, 1e-2)
    main = Phase(MAIN_PHASE, adaptation, 0.5, steps, 1e-2, 1e-2)
    return make_image_job(folder, base, phases=(head, main), **how)


def _pixels(bundle: Path, count: int = 20) -> torch.Tensor:
    fresh = [Image.open(io.BytesIO(picture(n % 2 == 1, 1000 + n))) for n in range(count)]
    pixels: torch.Tensor = AutoImageProcessor.from_pretrained(bundle)(fresh, return_tensors="pt")["pixel_values"]
    return pixels


def test_a_group_has_sixteen_channels_or_more_and_there_are_32_at_most() -> None:
    sizes = [(1, 1), (8, 1), (16, 1), (24, 1), (32, 2), (40, 2), (48, 3), (64, 4), (112, 7), (144, 9), (240, 15)]
    sizes += [(320, 20), (480, 30), (512, 32), (672, 32), (1152, 32), (1280, 32), (2048, 32), (521, 1)]
    assert [(size, num_groups(size)) for size, _ in sizes] == sizes


def test_it_is_the_groups_norm_of_what_the_statistics_have_standardized() -> None:
    """Beside a loop over rows and groups in float64, written down from the papers."""
    generator = torch.Generator().manual_seed(0)
    norm = GroupNorm(48, eps=1e-3).double().train()  # in whatever mode: it has no statistics to update
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor, 0.5, 1.0, generator=generator)
    nn.init.uniform_(norm.running_var, 0.2, 5.0, generator=generator)
    x = torch.randn(3, 48, 4, 5, dtype=torch.float64, generator=generator)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    expected = torch.empty_like(x)
    for row in range(3):
        z = (x[row] - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-3).sqrt()
        for group in range(3):
            inside = slice(16 * group, 16 * (group + 1))
            values = z[inside]
            expected[row, inside] = (values - values.mean()) / (values.var(correction=0) + 1e-3).sqrt()
        expected[row] = norm.weight[:, None, None] * expected[row] + norm.bias[:, None, None]
    assert torch.allclose(norm(x), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_no_image_changes_what_another_gets(images_base: tuple[str, Path]) -> None:
    base = AutoModelForImageClassification.from_pretrained(images_base[1])
    model = with_group_norm(base, lambda made: [name for name, _ in made.named_parameters()]).double()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    other = torch.cat([x[:1], 100 * torch.randn_like(x[1:])])
    with torch.inference_mode():
        assert torch.allclose(model(x).logits[0], model(other).logits[0], rtol=1e-9)


def test_the_weights_are_the_bases_and_the_answers_are_others(images_base: tuple[str, Path]) -> None:
    base = AutoModelForImageClassification.from_pretrained(images_base[1])
    model = with_group_norm(base, lambda made: [name for name, _ in made.named_parameters()])
    before, after = base.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.model_type == f"{images_base[0]}_group_norm"
    x = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        assert not torch.allclose(base(x).logits, model(x).logits, rtol=0.01)


@pytest.mark.parametrize(
    ("adaptation", "where"),
    [
        (FULL, "everywhere"),
        (LastLayers(1, batch_norm="group_norm"), "in the last stage"),
        (Freeze(("*encoder.stages.0.*", "*encoder.blocks.0.*"), batch_norm="group_norm"), "but in the first stage"),
        (BitFit(batch_norm="group_norm"), "everywhere"),
        (Full(), "nowhere"),
    ],
    ids=["full", "last_layers", "freeze", "bitfit", "frozen"],
)
def test_what_would_not_train_is_not_replaced(
    tmp_path: Path, images_base: tuple[str, Path], adaptation: Adaptation, where: str
) -> None:
    family, base = images_base
    job = _job(tmp_path / "job", images_base, adaptation)
    architecture = family_for(family, "image_classification")
    original = architecture.load(base, job.spec.task)
    every = {name for name, module in original.named_modules() if isinstance(module, nn.BatchNorm2d)}
    first, last = ({n for n in every if f".stages.{i}." in n or f".blocks.{i}." in n} for i in (0, 1))
    assert len(every) > len(first | last) > len(last) > 0
    places = {"everywhere": every, "in the last stage": last, "but in the first stage": every - first, "nowhere": set()}
    model = load_model(architecture, job.spec)
    assert {name for name, module in model.named_modules() if isinstance(module, GroupNorm)} == places[where]


@pytest.mark.parametrize("adaptation", [FULL, Full()], ids=["replaced", "frozen"])
def test_what_trains_is_known_before_it_is_loaded(
    tmp_path: Path, images_base: tuple[str, Path], adaptation: Adaptation
) -> None:
    """The service, by the names of a header alone, against what the trainer makes of the same files."""
    family, folder = images_base
    architecture = family_for(family, "image_classification")
    model = load_model(architecture, _job(tmp_path / "job", images_base, adaptation).spec)
    base = inspect(folder, folder, "base").base
    known = trained_names(base, TASKS["image_classification"], norms=adaptation is FULL)
    assert {*known} == {*architecture.body_parameters(model)}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MadeJob]:
    """Of each family a private job of every weight, with a checkpoint on the way."""
    made = {}
    for family in ("resnet", "efficientnet"):
        folder = tmp_path_factory.mktemp(family)
        job = _job(folder / "job", (family, _base(folder / "base", family)), FULL, steps=40, noise=0.3)
        job = dataclasses.replace(job, spec=dataclasses.replace(job.spec, published_steps=(5,)))
        job.spec.write(job.folder)
        run(job.folder, KEY, Control(None))
        made[family] = job
    return made


@pytest.mark.parametrize("family", ["resnet", "efficientnet"])
def test_a_private_job_learns_and_trains_what_took_the_place(bundles: dict[str, MadeJob], family: str) -> None:
    job = bundles[family]
    bundle = job.folder / "results/model"
    curve = job.metrics()["train_loss_curve"]
    assert curve[-1]["train_loss"] < 0.6 * curve[0]["train_loss"]
    before, after = load_file(Path(job.spec.base.path) / "model.safetensors"), load_file(bundle / "model.safetensors")
    assert before.keys() == after.keys()
    rests = {name for name in before if torch.equal(before[name], after[name])}
    fixed = {name for name in before if "running_" in name or "num_batches" in name or "squeeze_excite" in name}
    assert rests == fixed
    assert (bundle / GROUP_NORM_CODE).read_bytes() == Path(modeling_group_norm.__file__).read_bytes()
    card = (bundle / "README.md").read_text()
    assert 'model="PATH_OF_THIS_FOLDER", trust_remote_code=True' in card
    assert GROUP_NORM_CODE in card
    for folder in (bundle, job.folder / "taken/5/results/model"):
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == FAMILIES[f"{family}_group_norm"].auto_map
        assert (folder / GROUP_NORM_CODE).exists()


def test_its_bundle_loads_where_there_is_no_privtune(bundles: dict[str, MadeJob], tmp_path: Path) -> None:
    folders = [job.folder / "results/model" for job in bundles.values()]
    pixels = _pixels(folders[0])
    for folder, theirs in zip(folders, answers_elsewhere(folders, pixels, tmp_path), strict=True):
        with torch.inference_mode():
            ours = AutoModelForImageClassification.from_pretrained(folder)(pixels).logits
        assert torch.allclose(torch.tensor(theirs["logits"]), ours, rtol=1e-4, atol=1e-5)
        named = [theirs["id2label"][str(int(each))] for each in ours.argmax(1)]
        assert sum(name == ("dark", "bright")[n % 2] for n, name in enumerate(named)) >= 16
        assert theirs["pipeline"] == named
        assert theirs["without_trust"] == "ValueError"  # never with BatchNorm in its place


def test_a_bundle_is_trained_further_and_none_of_its_code_runs(tmp_path: Path, images_base: tuple[str, Path]) -> None:
    family, _ = images_base
    job = _job(tmp_path / "job", images_base, LastLayers(1, batch_norm="group_norm"))
    run(job.folder, KEY, Control(None))
    bundle = shutil.copytree(job.folder / "results/model", tmp_path / "bundle")
    (bundle / GROUP_NORM_CODE).write_text("raise SystemExit('code of a bundle was run')")
    first = json.loads((bundle / "config.json").read_text())["group_norm_layers"]
    found = inspect(bundle, tmp_path, "ft-x", "fine_tuned").base
    assert (found.family, found.trained_for) == (f"{family}_group_norm", "image_classification")
    for number, (adaptation, every) in enumerate([(Full(), False), (FULL, True), (Head(), False)]):
        again = _job(tmp_path / f"again-{number}", (found.family, bundle), adaptation)
        run(again.folder, KEY, Control(None))
        made = again.folder / "results/model"
        layers = json.loads((made / "config.json").read_text())["group_norm_layers"]
        assert (len(layers) > len(first)) == every
        assert set(first) <= set(layers)
        assert "SystemExit" not in (made / GROUP_NORM_CODE).read_text()
        before, after = (load_file(folder / "model.safetensors") for folder in (bundle, made))
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        trained = {f"{name}.{part}" for name in layers for part in ("weight", "bias")}
        assert trained <= moved or (isinstance(adaptation, Head) and not trained & moved)


def test_a_base_without_batch_norm_is_refused(tmp_path: Path) -> None:
    base = make_image_base(tmp_path / "vit", "vit")
    with pytest.raises(TrainerFailure) as refused:
        run(_job(tmp_path / "job", ("vit", base), FULL).folder, KEY, Control(None))
    assert refused.value.code == "base_model_invalid"


@pytest.mark.parametrize("names", [["resnet.encoder"], ["../../secret"], ["classifier.1"], [3]])
def test_layers_that_are_no_batch_norm_are_an_invalid_base(tmp_path: Path, names: list[Any]) -> None:
    base = make_image_base(tmp_path / "base", "resnet")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "resnet_group_norm", "group_norm_layers": names}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainerFailure) as refused:
        run(_job(tmp_path / "job", ("resnet_group_norm", base), FULL).folder, KEY, Control(None))
    assert refused.value.code == "base_model_invalid"
