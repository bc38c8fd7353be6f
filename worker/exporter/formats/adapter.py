"""A PEFT folder: what a LoRA job changed, without the base. Plain `peft` puts it on the base again.

A bundle's weights are merged. The change of each matrix, merged less base, has the job's rank up to float32's rounding,
so its singular value decomposition gives factors again: not the ones that were trained, but with the same product.
What changed otherwise (a new head, the pooling layer that the base does not have) is saved whole (`modules_to_save`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from worker.exporter import card
from worker.exporter.formats.maker import Made
from worker.exporter.reference import Batch, Reference, answer
from worker.exporter.spec import ExportFailure, ExportSpec

#: What float32 leaves of a matrix of lower rank, in units of its largest singular value and of the weights' own size.
_ROUNDING, _WEIGHT_ROUNDING = 1e-3, 1e-6

_USAGE = """```python
from peft import PeftModel
from transformers import AutoConfig, {loader}

# config.json here has what the base's does not: the classes, and the layers that were added.
config = AutoConfig.from_pretrained("PATH_OF_THIS_FOLDER")
base = {loader}.from_pretrained("PATH_OF_{base}", config=config)
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER").merge_and_unload().eval()
{calls}```

transformers says that some weights of the base are newly initialised: they are the ones that this folder brings."""


def make(folder: Path, spec: ExportSpec, reference: Reference, output: Path) -> Made:
    """Raises ExportFailure `adapter_not_exact` where the model is no change of low rank."""
    assert spec.base_path is not None
    assert spec.rank is not None
    base, missing = _base(reference, Path(spec.base_path))
    factors, whole = _changes(reference.model, base, missing, spec.rank)
    conv = any(isinstance(base.get_submodule(name), Conv1D) for name in factors)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.rank,
        lora_dropout=0.0,
        target_modules=sorted(factors),
        modules_to_save=sorted(whole),
        fan_in_fan_out=conv,
        inference_mode=True,
        base_model_name_or_path=spec.base,
    )
    base.config._name_or_path = base.name_or_path = spec.base
    adapted = get_peft_model(base, config)
    _fill(adapted, reference.model, factors, whole)
    adapted.peft_config["default"].base_model_name_or_path = spec.base  # not the path of this machine
    adapted.save_pretrained(str(output), save_embedding_layers=False)
    parameters = sum(tensor.numel() for pair in factors.values() for tensor in pair)
    parameters += sum(p.numel() for name in whole for p in reference.model.get_submodule(name).parameters())
    reloaded = reload(reference, Path(spec.base_path), output)
    calls = card.calls_loaded(reference.folder)
    loader = reference.kind.loader.__name__
    usage = _USAGE.format(loader=loader, base=_place(spec.base), calls=f"\n{calls}\n" if calls else "")

    def run(inputs: Batch) -> Tensor:
        return answer(reloaded, inputs)

    return Made(run, usage, parameters, {"rank": spec.rank, "adapted_matrices": len(factors)})


def _place(base: str) -> str:
    """`org/name-1.0` → ORG_NAME_1_0: a word for the reader to replace."""
    return re.sub(r"[^A-Z0-9]+", "_", base.upper())


def _base(reference: Reference, path: Path) -> tuple[PreTrainedModel, set[str]]:
    """The base under the model's config, and the parameters that it does not have: they are initialised anew."""
    try:
        config = AutoConfig.from_pretrained(reference.folder, local_files_only=True, trust_remote_code=False)
        model: PreTrainedModel
        model, info = reference.kind.loader.from_pretrained(
            path,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ExportFailure("base_model_invalid", str(error)) from error
    model.requires_grad_(False)
    model.train(False)
    return model, set(info["missing_keys"])


def _changes(
    model: PreTrainedModel, base: PreTrainedModel, missing: set[str], rank: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], set[str]]:
    """Factors (A, B) by module, for matrices whose change has the rank; and the modules to be saved whole."""
    before = dict(base.named_parameters())
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    whole: set[str] = set()
    saved, total = 0, 0
    for name, value in model.named_parameters():
        total += value.numel()
        module_name, _, leaf = name.rpartition(".")
        if name not in missing and torch.equal(value, before[name]):
            continue
        module = model.get_submodule(module_name)
        pair = None
        if leaf == "weight" and name not in missing and isinstance(module, nn.Linear | Conv1D):
            pair = _factorize(value, before[name], rank, transposed=isinstance(module, Conv1D))
        if pair is not None:
            factors[module_name] = pair
        else:
            whole.add(module_name)
            saved += value.numel()
    whole -= {name for name in whole if name in factors}
    if not factors or saved > total / 2:
        raise ExportFailure("adapter_not_exact", f"{len(factors)} matrices, {saved} of {total} parameters besides")
    return factors, whole


def _factorize(after: Tensor, before: Tensor, rank: int, *, transposed: bool) -> tuple[Tensor, Tensor] | None:
    """A (rank, inputs) and B (outputs, rank) with B A = after - before; None where the change has a higher rank, or
    where the factors would be no smaller than the matrix."""
    change = after.double() - before.double()
    change = change.T if transposed else change
    outputs, inputs = change.shape
    if rank * (outputs + inputs) >= outputs * inputs:
        return None
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    rounding = _ROUNDING * float(values[0]) + _WEIGHT_ROUNDING * float(torch.linalg.matrix_norm(after.double()))
    if float(values[rank]) > rounding:
        return None
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]).float(), (left[:, :rank] * root).float()


@torch.no_grad()
def _fill(adapted: Any, model: PreTrainedModel, factors: dict[str, tuple[Tensor, Tensor]], whole: set[str]) -> None:
    inner = adapted.base_model.model
    for name, (a, b) in factors.items():
        layer: Any = inner.get_submodule(name)
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
    for name in whole:
        wrapper: Any = inner.get_submodule(name)
        wrapper.modules_to_save["default"].load_state_dict(model.get_submodule(name).state_dict())


def reload(reference: Reference, base_path: Path, output: Path) -> PeftModel:
    """The base anew, and the folder on it, as a user would load it."""
    fresh, _ = _base(reference, base_path)
    try:
        reloaded = PeftModel.from_pretrained(fresh, output)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ExportFailure("export_check_failed", str(error)) from error
    reloaded.train(False)
    return reloaded
