"""What supervisor and trainer say over the job folder's Unix socket: one JSON object a line, fixed codes and numbers.

No message carries text that was computed from private rows. Free of torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args


@dataclass(frozen=True, slots=True)
class Ready:
    """All that needs no row is done: the answer is Rows. What fails before costs no budget, whatever the trainer says,
    since it has none."""

    type: ClassVar[str] = "ready"


@dataclass(frozen=True, slots=True)
class Started:
    """The model is loaded and checked; steps follow. Sizes are public: they come from the base and the adaptation."""

    type: ClassVar[str] = "started"
    device: str
    trainable_parameters: int
    total_parameters: int
    max_physical_batch_tokens: int
    threads: int
    ranks: int


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the user should know, as a fixed code with numbers or public names."""

    type: ClassVar[str] = "notice"
    code: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Truncation:
    """What of a file's rows lies beyond the longest input. Exact and not private: for the data's owner, never released.

    dataset: `training` or `validation`. tokens: of all rows, what is cut included. cut: {text, tokens, source, target
    or chat: {rows, tokens}}, the rows that lost something and what they lost.
    """

    type: ClassVar[str] = "truncation"
    dataset: str
    rows: int
    tokens: int
    cut: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Progress:
    """executed: steps done of each part of the plan. step of num_steps counts over all parts."""

    type: ClassVar[str] = "progress"
    step: int
    num_steps: int
    phase: str
    executed: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`checkpoints/<step>/` is complete and synced to disk. It counts only once the supervisor has committed it.

    losses: points of the private loss curve that this checkpoint completes (`app.privacy.loss_curve.points`): noised,
    but not to be told before it is committed.
    """

    type: ClassVar[str] = "checkpoint"
    step: int
    executed: Mapping[str, int]
    losses: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class Stopped:
    """The answer to Stop: nothing more will be executed."""

    type: ClassVar[str] = "stopped"
    step: int
    executed: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Finished:
    """results/ is complete."""

    type: ClassVar[str] = "finished"
    executed: Mapping[str, int]
    train_seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """code: one of FAILURES; never a text from the run."""

    type: ClassVar[str] = "failed"
    code: str


@dataclass(frozen=True, slots=True)
class Rows:
    """From the supervisor, once the trainer is Ready: the rows are in the folder."""

    type: ClassVar[str] = "rows"


@dataclass(frozen=True, slots=True)
class Stop:
    """From the supervisor: finish the step at hand, execute no other, answer Stopped."""

    type: ClassVar[str] = "stop"


@dataclass(frozen=True, slots=True)
class Allowed:
    """From the supervisor: steps up to this one, counted over all parts, may be executed. The database has it that they
    may have been, whatever becomes of supervisor and trainer."""

    type: ClassVar[str] = "allowed"
    step: int


#: What a job can fail with in the trainer, and what its user reads.
FAILURES: dict[str, str] = {
    "out_of_memory": "The training process ran out of memory.",
    "missing_gradient_norm": "A trainable parameter has no per-record gradient norm; no step was made.",
    "data_mismatch": "The rows do not match what the job was planned for.",
    "plan_mismatch": "The job's phases are not those of its privacy plan; no step was made.",
    "resume_mismatch": "The checkpoint was made under another plan or other data.",
    "base_model_invalid": "The base model cannot be loaded.",
    "nothing_to_train": "The adaptation leaves no parameter to train; no step was made.",
    "export_check_failed": "The exported model did not load or did not answer as the trained one.",
    "ranks_disagree": "The training processes came to different weights.",
    "trainer_error": "The training process failed.",
}

Message = (
    Ready | Started | Notice | Truncation | Progress | Checkpoint | Stopped | Finished | Failed | Rows | Stop | Allowed
)

_MESSAGES: dict[str, type[Message]] = {cls.type: cls for cls in get_args(Message)}


def encode(message: Message) -> bytes:
    """One line, newline included."""
    return json.dumps({"type": message.type, **dataclasses.asdict(message)}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The inverse of `encode`. Raises ValueError on anything else."""
    try:
        fields = json.loads(line)
        return _MESSAGES[fields.pop("type")](**fields)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError("not a message") from error
