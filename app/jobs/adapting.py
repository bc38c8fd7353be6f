"""Whether an adaptation finds something to train in a base, as far as its files say; what fails later is charged."""

from __future__ import annotations

from app.catalog.adaptations import Adaptation, AttentiveHead, BitFit, Freeze, Head, Lora, matches
from app.catalog.bases import BaseModel
from app.catalog.families import FAMILIES
from app.catalog.tasks import Task
from app.errors import InvalidRequest

#: Ends of the names of tensors that are counted or computed, not learnt.
_BUFFERS = ("final_logits_bias", "position_ids", ".running_mean", ".running_var", ".num_batches_tracked")


def require(adaptation: Adaptation, task: Task, base: BaseModel) -> None:
    """Raises InvalidRequest: adaptation_not_supported, lora_matches_nothing, freeze_matches_nothing,
    freeze_matches_everything."""
    if task.head == "pretrained" and isinstance(adaptation, Head):
        raise _unsupported(f"The task `{task.type}` trains the base's own head: there is no new one to train alone.")
    if isinstance(adaptation, BitFit) and base.bias_parameters == 0:
        raise _unsupported("This base model has no bias terms that could train.")
    if isinstance(adaptation, Lora) and not FAMILIES[base.family].lora:
        raise _unsupported("This base model has no matrices for LoRA.")
    if isinstance(adaptation, Lora):
        _require_matrices(adaptation, base)
    if isinstance(adaptation, AttentiveHead):
        if not (FAMILIES[base.family].attentive and task.head == "pooled"):
            raise _unsupported("An attentive head is for classification and regression of texts by an encoder.")
        if base.pools and adaptation.num_layers is not None and adaptation.num_layers < base.num_layers:
            raise _unsupported("A model that pools already keeps all of its blocks: leave `num_layers` out.")
    if isinstance(adaptation, Freeze):
        _require_some(adaptation, task, base)


def _require_matrices(lora: Lora, base: BaseModel) -> None:
    """Each target is the end of some weight's name. Of images transformers has names of its own beside the files'."""
    if FAMILIES[base.family].kind == "image" or not base.parameter_names:
        return
    for target in lora.targets:
        if not any(name.endswith(f".{target}.weight") for name in base.parameter_names):
            raise InvalidRequest(
                "lora_matches_nothing",
                "A target is no matrix of this base model; leave `targets` out to take the usual ones.",
                param="adaptation.targets",
            )


def _require_some(freeze: Freeze, task: Task, base: BaseModel) -> None:
    """Each pattern is of some name, and not all names are of some pattern."""
    names = [name for name in base.parameter_names if not name.endswith(_BUFFERS)]
    if not names:
        raise _unsupported("The names of this base model's weights are not known before it is loaded.")
    useless = [n for n, pattern in enumerate(freeze.patterns) if not any(matches(pattern, name) for name in names)]
    if useless or not freeze.patterns:
        which = f"The pattern at place {useless[0]}" if useless else "An empty list"
        raise InvalidRequest(
            "freeze_matches_nothing",
            f"{which} freezes nothing: no weight of this base model has such a name. The first is called {names[0]}.",
            param="adaptation.patterns",
        )
    if all(map(freeze.freezes, names)):
        instead = "" if task.head == "pretrained" else "; the adaptation `head` trains a new head alone"
        raise InvalidRequest(
            "freeze_matches_everything",
            f"These patterns freeze every weight of this base model{instead}.",
            param="adaptation.patterns",
        )


def _unsupported(message: str) -> InvalidRequest:
    return InvalidRequest("adaptation_not_supported", message, param="adaptation.type")
