"""Which tensors of a base a task trains, as far as their names say. The others its model leaves out, as it does an
encoder's pooler and the heads of other tasks, or keeps as they are."""

from __future__ import annotations

import re

from app.catalog.bases import BaseModel
from app.catalog.families import FAMILIES
from app.catalog.tasks import Task

#: Ends of the names of what is counted or computed, not learnt, in any family.
_NOT_LEARNT = (
    "final_logits_bias", "position_ids", ".inv_freq", ".running_mean", ".running_var", ".num_batches_tracked",
)  # fmt: skip

#: BatchNorm's own, which never trains, has this beside it. So does the GroupNorm that a job puts in its place.
_COUNTED = ".running_mean"

#: Never trains either, see the trainer's `families.images`.
_GATES = ".squeeze_excite."

_BLOCK = re.compile(r"(?:^|\.)(?:layers?|h)\.(\d+)\.")


def trained_names(base: BaseModel, task: Task, *, norms: bool = False) -> tuple[str, ...]:
    """Names of the base's tensors that may train on that task, as its files have them; none where the names are not
    known. A new head has none. norms: whether the job puts GroupNorm in the place of BatchNorm, as an earlier one may
    have done."""
    family = FAMILIES[base.family]
    parts = family.body + (family.pretrained_head if task.head == "pretrained" else ())
    begins = re.compile(rf"(?:\w+\.)?(?:{'|'.join(map(re.escape, parts))})")
    counted = () if norms or family.auto_map else base.parameter_names
    normed = {name.removesuffix(_COUNTED) for name in counted if name.endswith(_COUNTED)}
    return tuple(
        name
        for name in base.parameter_names
        if begins.match(name)
        and not name.endswith(_NOT_LEARNT + family.fixed)
        and name.rpartition(".")[0] not in normed
        and _GATES not in name
        and not (family.kind in ("encoder", "causal") and _beyond(name, base.num_layers))
    )


def _beyond(name: str, num_layers: int) -> bool:
    """Whether it is of a block that the configuration does not count, or of a pooling layer of ours."""
    block = _BLOCK.search(name)
    return block is not None and int(block[1]) >= num_layers
