"""Whether an adaptation finds something to train in a base, as far as its files say; the rest its trainer finds out."""

from __future__ import annotations

from app.catalog.adaptations import (
    Adaptation,
    AttentiveHead,
    AttentiveLora,
    BitFit,
    Freeze,
    Head,
    Lora,
    matches,
    replaces_batch_norm,
)
from app.catalog.bases import BaseModel
from app.catalog.families import FAMILIES
from app.catalog.parameters import trained_names
from app.catalog.tasks import Task
from app.errors import InvalidRequest
from app.jobs.schemas import batch_norm_not_trained


def require(adaptation: Adaptation, task: Task, base: BaseModel) -> None:
    """Raises InvalidRequest: adaptation_not_supported, invalid_adaptation, lora_matches_nothing,
    freeze_matches_nothing, freeze_matches_everything, batch_norm_missing, batch_norm_not_trained."""
    if task.head == "pretrained" and isinstance(adaptation, Head):
        raise _unsupported(f"The task `{task.type}` trains the base's own head: there is no new one to train alone.")
    if isinstance(adaptation, BitFit) and not _has_biases(adaptation, task, base):
        raise _unsupported("This base model has no bias terms that could train.")
    if isinstance(adaptation, Lora) and not FAMILIES[base.family].lora:
        raise _unsupported("This base model has no matrices for LoRA.")
    if isinstance(adaptation, Lora | AttentiveLora) and adaptation.rank > base.hidden_size:
        why = f"A rank is at most this base model's width, {base.hidden_size}: `full` trains all that a matrix holds."
        raise InvalidRequest("invalid_adaptation", why, param="adaptation.rank")
    if isinstance(adaptation, Lora):
        _require_matrices(adaptation, task, base)
    if isinstance(adaptation, AttentiveHead | AttentiveLora):
        if not (FAMILIES[base.family].attentive and task.head == "pooled"):
            raise _unsupported("An attentive head is for classification and regression of texts by an encoder.")
        if base.pools and adaptation.num_layers is not None and adaptation.num_layers < base.num_layers:
            raise _unsupported("A model that pools already keeps all of its blocks: leave `num_layers` out.")
    if isinstance(adaptation, Freeze):
        _require_some(adaptation, task, base)
    if replaces_batch_norm(adaptation):
        _require_norms(adaptation, task, base)


def _has_biases(adaptation: BitFit, task: Task, base: BaseModel) -> bool:
    """Whether some bias term of the base trains on the task, as far as names are known."""
    if not base.parameter_names:
        return base.bias_parameters > 0
    return any(name.endswith(".bias") for name in trained_names(base, task, norms=replaces_batch_norm(adaptation)))


def _require_matrices(lora: Lora, task: Task, base: BaseModel) -> None:
    """Each target is the end of the name of some weight that trains. Of images transformers has names of its own
    beside the files'."""
    if FAMILIES[base.family].kind == "image" or not base.parameter_names:
        return
    names = trained_names(base, task)
    for target in lora.targets:
        if not any(name.endswith(f".{target}.weight") for name in names):
            raise InvalidRequest(
                "lora_matches_nothing",
                f"A target is no matrix of this base model that `{task.type}` could train; leave `targets` out to take "
                "the usual ones.",
                param="adaptation.targets",
            )


def _require_some(freeze: Freeze, task: Task, base: BaseModel) -> None:
    """Each pattern is of some name that would train, and not all of these are of some pattern."""
    if not base.parameter_names:
        raise _unsupported("The names of this base model's weights are not known before it is loaded.")
    names = trained_names(base, task, norms=replaces_batch_norm(freeze))
    useless = [n for n, pattern in enumerate(freeze.patterns) if not any(matches(pattern, name) for name in names)]
    if useless or not freeze.patterns:
        raise InvalidRequest(
            "freeze_matches_nothing", _useless(freeze, useless, names, task, base), param="adaptation.patterns"
        )
    if all(map(freeze.freezes, names)):
        instead = "" if task.head == "pretrained" else "; the adaptation `head` trains a new head alone"
        raise InvalidRequest(
            "freeze_matches_everything",
            f"These patterns freeze every weight of this base model that `{task.type}` trains{instead}.",
            param="adaptation.patterns",
        )


def _useless(freeze: Freeze, useless: list[int], names: tuple[str, ...], task: Task, base: BaseModel) -> str:
    first = f" The first that trains is called {names[0]}." if names else ""
    if not useless:
        return f"An empty list freezes nothing: name some of this base model's weights.{first}"
    pattern = freeze.patterns[useless[0]]
    if any(matches(pattern, name) for name in base.parameter_names):
        why = f"`{task.type}` leaves out, or never trains, the weights of such a name"
    else:
        why = "no weight of this base model has such a name"
    return f"The pattern at place {useless[0]} freezes nothing: {why}.{first}"


def _require_norms(adaptation: Adaptation, task: Task, base: BaseModel) -> None:
    """The base has BatchNorm, and some of it trains once it is replaced."""
    if not FAMILIES[base.family].batch_norm:
        raise InvalidRequest(
            "batch_norm_missing",
            "This base model has no BatchNorm that could be replaced; the norms that it has train as they are.",
            param="adaptation.batch_norm",
        )
    norms = {*trained_names(base, task, norms=True)} - {*trained_names(base, task)}
    if isinstance(adaptation, Freeze) and norms and all(map(adaptation.freezes, norms)):
        raise batch_norm_not_trained("These patterns freeze every norm of this base model.")


def _unsupported(message: str) -> InvalidRequest:
    return InvalidRequest("adaptation_not_supported", message, param="adaptation.type")
