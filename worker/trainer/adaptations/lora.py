"""LoRA (Hu et al. 2021) by peft: injected into the base's layers, merged into their weights on export.

B starts at zero, so that the injection changes no answer; A is drawn from torch's generator, seeded by the public seed.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from app.catalog.adaptations import AttentiveLora, Lora
from worker.trainer.adaptations.adapter import Adapter
from worker.trainer.failure import TrainerFailure
from worker.trainer.families.interface import Family
from worker.trainer.families.loading import names_in_files


def _parameters(model: PreTrainedModel, family: Family, adaptation: Lora) -> list[str]:
    targets = adaptation.targets or family.lora_targets
    ends, in_files = tuple(f".{target}.weight" for target in targets), names_in_files(model)
    matrices = [
        name.removesuffix(".weight")
        for name in family.body_parameters(model)
        if (name.endswith(ends) or in_files[name][0].endswith(ends)) and model.get_parameter(name).ndim == 2
    ]
    if not matrices:
        raise TrainerFailure("base_model_invalid", f"the base has no matrices {targets}")
    return inject(model, matrices, adaptation)


def inject(model: PreTrainedModel, matrices: list[str], adaptation: Lora | AttentiveLora) -> list[str]:
    """Adds the updates to the matrices of these modules; the names of the factors."""
    # peft takes fractions too, whatever its annotation says.
    alpha: Any = adaptation.alpha
    # GPT-2 keeps its matrices the other way round.
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in matrices)
    config = LoraConfig(
        r=adaptation.rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=matrices, fan_in_fan_out=transposed
    )
    inject_adapter_in_model(config, model)
    return [name for name, _ in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]


def merge(model: PreTrainedModel) -> None:
    """Adds the updates to the matrices, and takes the factors away."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


LORA = Adapter(_parameters, merge)
