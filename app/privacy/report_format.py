"""What a privacy report says in fixed words, and its one canonical form in bytes: for who writes, signs and checks it.

The contents follow the reporting list of Ponomareva et al. 2023, "How to DP-fy ML".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

FORMAT = "privtune.privacy_report/1"

NOT_PRIVATE = "Trained without differential privacy, on data that was declared public."
MEANING = (
    "Whoever sees all that was released can hardly tell whether the records of one unit were used or replaced by "
    "nothing. The number of units is public and fixed."
)
SAMPLING = "Poisson: each unit is in each batch independently, with the part's sample rate"
COMMITMENT = "HMAC-SHA-256 of the rows' SHA-256, under a key of the server: binds them and tells nothing about them"
SIGNED = "RFC 8785 (JCS) form of this report without signature.value, in UTF-8"

LINEAGE = (
    "The base model was trained by this server. Training it further is post-processing of it: whoever is in an earlier "
    "job's rows alone is covered by that job's own ε and δ, and whoever is in the rows of several jobs by their "
    "composition, which is stated for each budget that they share. Who is in rows under different budgets is covered "
    "by neither figure alone."
)

#: What was treated as public, and where a list of classes may come from.
TRAINING_UNITS = "number of training units"
VALIDATION_UNITS = "number of validation units"
COLUMN_NAMES = "names of the columns read"
CLASSES = "list of classes"
LONGEST_INPUT = "longest input, in tokens"
OPTIONS = "every option of the job"
DECLARED = "declared in the request"
FROM_FILE = "taken from the file"
NO_CLASSES = "the task has none"

#: δ at which a report states ε, beside the job's own.
DELTAS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
FALSE_POSITIVE_RATES = (0.001, 0.01)

#: What a job may let out beside weights and numbers of steps, by the kind of its evaluation.
_METRICS = {
    "none": [],
    "private": ["metrics, computed from sums over units that were noised and charged"],
    "public": ["metrics, exact, on data declared public"],
}
_LOSS_CURVE = {
    "dp_sgd": "the training loss: means of clipped losses, noised and charged together with each step's gradients",
    "none": "the training loss: means of clipped losses, exact, on data declared public",
}

_CHECKPOINTS = "the weights of checkpoints on the way, each with a report of its own"

#: What one noised vector of a step holds, by the plan's `clipping`, or by the name of what rides along.
_GRADIENTS = {
    "flat": "gradients, each unit's clipped to norm C",
    "automatic": "gradients, each unit's g scaled to g / (‖g‖ + γ)",
    "per_layer": "gradients, each unit's clipped by layer to norms C_l, with √Σ C_l² = C",
    "adaptive": "gradients, each unit's clipped to norm C, which starts here and follows a quantile of the norms",
}
#: How gradients of a private plan may be clipped.
CLIPPINGS = frozenset(_GRADIENTS)
_LOSSES = "losses, each unit's clipped to [0, B], less B/2"
_COUNT = "number of units with a norm within C, each counted as ½ or -½"

_NOT_COVERED = (
    "When the job ran, how long it took, its estimated finish, and, had it failed, when and with which code.",
    "How many attempts the job took, and whether its physical batch was halved for want of memory.",
    "The file's size in bytes and the types of its columns; of a refused file, the line and the kind of its error.",
    "That a request was refused for what the rows hold: a class that was not declared, a value that is missing or no "
    "number, a chat that is none.",
    "People who have records under another budget too: each budget's limit speaks about its own records alone.",
    "The lowest bits of noise drawn in floating point (arXiv 2112.05307), and rounding that tips a prediction's class "
    "or a norm over a threshold.",
    "Whoever holds both a backup of the service's database from the time of the job and its secret key.",
)
_SEVERAL_RECORDS = "A person with several records, as a whole: each record is protected by itself."

_LARGEST_INTEGER = 2**53 - 1


def not_covered(mechanism: str, unit_column: str | None) -> list[str]:
    """What no (ε, δ) of the report speaks about."""
    if mechanism == "none":
        return []
    return [*_NOT_COVERED, *([_SEVERAL_RECORDS] if unit_column is None else [])]


def in_order(parts: Sequence[Mapping[str, Any]], executed: Mapping[str, int]) -> bool:
    """Whether these steps are what comes first in a plan: parts in full, one at most in part, then none.

    parts: as `PrivacyPlan.to_dict` has them. executed: steps of each of them.
    """
    going_on = True
    for part in parts:
        planned, done = part.get("num_steps", 1), executed[part["name"]]
        if not 0 <= done <= planned or (done and not going_on):
            return False
        going_on = going_on and done == planned
    return any(executed.values())


def released(plan: Mapping[str, Any], evaluation: str, *, checkpoints: bool) -> list[str]:
    """What a job of this plan, as JSON, may let out. checkpoints: whether it was asked to publish some. KeyError for an
    evaluation of unknown kind."""
    curve = any(part.get("loss") is not None for part in plan["parts"])
    return [
        "the model's weights",
        "numbers of steps",
        *([_CHECKPOINTS] if checkpoints else []),
        *([_LOSS_CURVE[plan["mechanism"]]] if curve else []),
        *_METRICS[evaluation],
    ]


def noised_together(part: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Of a phase in a private plan, as JSON: what each step noises as one vector, where that is more than gradients.

    noise_multiplier: standard deviation of the noise over the sensitivity, of each alone; that of the part is σ with
    σ⁻² = Σ noise_multiplier⁻².
    """
    riders = {"loss": _LOSSES, "quantile": _COUNT}
    shares = {name: part[name]["share"] for name in riders if part.get(name) is not None}
    if not shares:
        return None
    automatic = part["clipping"] == "automatic"
    sensitivities = {"loss": (part.get("loss") or {}).get("bound", 0.0) / 2.0, "quantile": 0.5}
    gradient_share = 1.0
    for share in shares.values():
        gradient_share -= share
    held = [(_GRADIENTS[part["clipping"]], 1.0 if automatic else part["max_grad_norm"], gradient_share)]
    held += [(riders[name], sensitivities[name], share) for name, share in shares.items()]
    return [
        {"what": what, "sensitivity": sensitivity, "noise_multiplier": part["noise_multiplier"] / math.sqrt(share)}
        for what, sensitivity, share in held
    ]


def filter_name(order: int) -> str:
    """The accountant of a budget whose plans are chosen one after another."""
    return f"Rényi filter of order {order}"


def parse(text: bytes | str) -> dict[str, Any]:
    """A report as stored. Raises ValueError for anything but one JSON object of distinct keys and finite numbers."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        report = json.loads(text, object_pairs_hook=distinct, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(report, dict):
        raise ValueError("not a JSON object")
    return report


def signed_bytes(report: Mapping[str, Any]) -> bytes:
    """What the signature signs: the canonical form of everything but the signature's value."""
    signature = {key: value for key, value in report["signature"].items() if key != "value"}
    return canonical({**report, "signature": signature})


def digest(value: Any) -> str:
    """SHA-256 of JSON with sorted keys and no spaces, as `PrivacyPlan.digest` has it."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


def canonical(value: Any) -> bytes:
    """The JSON Canonicalization Scheme (RFC 8785). Raises ValueError for what it has no form for."""
    return _text(value).encode()


def _text(value: Any) -> str:
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case str():
            return json.dumps(value, ensure_ascii=False)
        case int():
            if abs(value) > _LARGEST_INTEGER:
                raise ValueError("an integer that a double does not hold")
            return str(value)
        case float():
            return _number(value)
        case list() | tuple():
            return "[" + ",".join(map(_text, value)) + "]"
        case dict():
            if not all(isinstance(key, str) for key in value):
                raise ValueError("a key that is no string")
            items = sorted(value.items(), key=lambda item: item[0].encode("utf-16-be", "surrogatepass"))
            return "{" + ",".join(f"{_text(key)}:{_text(inner)}" for key, inner in items) + "}"
    raise ValueError(f"no JSON form for {type(value).__name__}")


def _number(value: float) -> str:
    """ECMAScript's Number::toString: the shortest digits that read back the same, which are Python's too."""
    if value == 0.0:
        return "0"
    sign, digits_, exponent = Decimal(repr(value)).normalize().as_tuple()
    if not isinstance(exponent, int):
        raise ValueError("not a finite number")
    digits = "".join(map(str, digits_))
    point = len(digits) + exponent
    if 0 < point <= 21:
        text = digits.ljust(point, "0") if len(digits) <= point else f"{digits[:point]}.{digits[point:]}"
    elif -6 < point <= 0:
        text = "0." + "0" * -point + digits
    else:
        fraction = f".{digits[1:]}" if len(digits) > 1 else ""
        text = f"{digits[0]}{fraction}e{point - 1:+d}"
    return ("-" if sign else "") + text
