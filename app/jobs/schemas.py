"""The body of a create: the wire's fields, and our own blocks beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, WithJsonSchema

from app.catalog.adaptations import ADAPTATIONS, Adaptation
from app.catalog.recipes import OptimizerName, ScheduleName
from app.errors import InvalidRequest
from app.exports.schemas import ExportBlock
from app.files.limits import MAX_RECORDS_PER_UNIT

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")


#: A code, or a name.
_LANGUAGE = r"^[A-Za-z][A-Za-z _()-]{1,39}$"


class _Strict(BaseModel):
    """A block in which a misspelt key is an error, not a default."""

    model_config = ConfigDict(extra="forbid")


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Finite = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_no_truth)]
Whole = Annotated[int, BeforeValidator(_no_truth)]


class Hyperparameters(_Strict):
    """The wire's three. `auto` follows the measured recipes."""

    n_epochs: Literal["auto"] | Annotated[Whole, Field(ge=1, le=1000)] = "auto"
    batch_size: Literal["auto"] | Annotated[Whole, Field(ge=1)] = "auto"
    learning_rate_multiplier: Literal["auto"] | Annotated[Finite, Field(gt=0, le=1000)] = "auto"


class Supervised(_Strict):
    """Supervised fine-tuning."""

    hyperparameters: Hyperparameters | None = None


class Method(_Strict):
    """The wire's `method`. Other types than supervised are named so that they can be refused by name."""

    type: str = Field(max_length=64)
    supervised: Supervised | None = None
    dpo: Any = None
    reinforcement: Any = None


def _documented_adaptations() -> dict[str, Any]:
    """A schema for each type. `adaptation_of` is what holds requests to them, with a code for each kind of mistake."""
    kinds: list[dict[str, Any]] = [
        {"description": "Chosen by measured rules.", "title": "Auto", "properties": {"type": {"const": "auto"}}}
    ]
    for cls in ADAPTATIONS.values():
        schema = TypeAdapter(cls).json_schema()
        own = {"type": {"const": cls.type}} | schema.get("properties", {})
        kinds.append({"description": inspect.cleandoc(cls.__doc__ or ""), "title": cls.__name__, "properties": own})
    return {"oneOf": [{"type": "object", "required": ["type"], **kind} for kind in kinds]}


AdaptationBlock = Annotated[dict[str, Any], WithJsonSchema(_documented_adaptations())]


class TaskBlock(_Strict):
    """columns: role → column name; labels: the classes, in the order of the model's outputs (where rows have numbers,
    the names of these, from 0 on); max_length: in tokens.

    multi_label: a row has any number of the classes. range: [low, high] of a regression's targets, declared since their
    true extremes are somebody's own; targets beyond it are cut off. source_prefix: what every source of a text-to-text
    task begins with; max_target_length: of a target, in tokens. source_lang, target_lang: of a translation, as
    `app.catalog.languages` tells them to the base.
    """

    type: str | None = Field(None, max_length=64)
    columns: dict[str, str] = Field(default_factory=dict, max_length=16)
    labels: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = Field(None, max_length=1000)
    max_length: Whole | None = Field(None, ge=8)
    multi_label: bool | None = None
    range: Annotated[list[Finite], Field(min_length=2, max_length=2)] | None = None
    source_prefix: str | None = Field(None, max_length=200)
    source_lang: str | None = Field(None, pattern=_LANGUAGE)
    target_lang: str | None = Field(None, pattern=_LANGUAGE)
    max_target_length: Whole | None = Field(None, ge=4)

    def options(self) -> dict[str, Any]:
        """What only some tasks take, as far as it was said; JSON-ready."""
        return self.model_dump(
            mode="json", exclude={"type", "columns", "labels", "max_length"}, exclude_none=True, exclude_unset=True
        )


class PrivacyUnitBlock(_Strict):
    """Whose presence is protected. Null: each record."""

    column: str | None = Field(None, max_length=64)


class PrivacyBlock(_Strict):
    """What is promised, and by which mechanism.

    privacy_unit: the training file's own, repeated. max_records_per_unit: how many of a unit's records a step takes.
    loss_curve: whether noised training losses are released; loss_bound: where each unit's loss is clipped for them.
    """

    mechanism: Literal["dp_sgd", "none"] = "dp_sgd"
    target_epsilon: Finite | None = None
    target_delta: Finite | None = None
    max_grad_norm: Annotated[Finite, Field(ge=1e-6, le=1e6)] | None = None
    clipping: Literal["flat", "automatic", "per_layer", "adaptive"] | None = None
    loss_curve: bool = True
    loss_bound: Annotated[Finite, Field(gt=0, le=1e6)] | None = None
    privacy_unit: PrivacyUnitBlock | None = None
    max_records_per_unit: Whole | None = Field(None, ge=1, le=MAX_RECORDS_PER_UNIT)


class EvaluationBlock(_Strict):
    """split: fraction of the training file that is held out, where there is no validation file.

    epsilon, or epsilon_share of the target: what the noised metrics may cost.
    """

    split: Annotated[Finite, Field(gt=0, le=0.5)] | None = None
    epsilon_share: Annotated[Finite, Field(gt=0, lt=1)] | None = None
    epsilon: Annotated[Finite, Field(gt=0)] | None = None


class OptimizerBlock(_Strict):
    """Of the main phase. `sgd` takes a learning rate of its own: the measured ones are AdamW's.

    learning_rate: of all that the phase trains, in place of the recipe's. momentum: of `sgd` (0.9).
    `dp_adam_bc`: AdamW whose second moment is freed of the noise's known variance (Tang et al. 2023).
    """

    type: OptimizerName = "adamw"
    learning_rate: Annotated[Finite, Field(gt=0, le=1000)] | None = None
    weight_decay: Annotated[Finite, Field(ge=0, le=10)] = 0.0
    momentum: Annotated[Finite, Field(ge=0, lt=1)] | None = None


class ScheduleBlock(_Strict):
    """Of the main phase's learning rates, by step count only: linear or cosine to zero, after a linear warm-up."""

    type: ScheduleName = "constant"
    warmup_steps: Whole = Field(0, ge=0)


class CheckpointsBlock(_Strict):
    """count: how many checkpoints on the way are published, evenly spread over the training steps."""

    count: Whole = Field(0, ge=0, le=20)


class CreateJob(BaseModel):
    """POST /fine_tuning/jobs. With nothing but model and training_file it is a private job under the defaults."""

    model_config = ConfigDict(extra="allow")  # so that an unknown key is refused by name, see `parsed`

    model: str = Field(min_length=1, max_length=200)
    training_file: str = Field(min_length=1, max_length=64)
    validation_file: str | None = Field(None, min_length=1, max_length=64)
    suffix: str | None = Field(None, min_length=1, max_length=64)
    seed: Whole | None = Field(None, ge=0, le=2**31 - 1)
    metadata: dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]] | None = (
        Field(None, max_length=16)
    )
    integrations: list[Any] | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    task: TaskBlock | None = None
    adaptation: AdaptationBlock | None = None
    privacy: PrivacyBlock = Field(default_factory=PrivacyBlock)
    evaluation: Literal["none"] | EvaluationBlock | None = None
    optimizer: OptimizerBlock | None = None
    schedule: ScheduleBlock | None = None
    checkpoints: CheckpointsBlock = Field(default_factory=CheckpointsBlock)
    export: ExportBlock | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without what was not said."""
        return self.model_dump(mode="json", exclude_none=True, exclude_unset=True)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal requests have equal ones."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def parsed(body: CreateJob) -> CreateJob:
    """The body, once it asks for nothing that this server does not know. Raises InvalidRequest."""
    for key in body.model_extra or {}:
        param = key if _NAME.fullmatch(key) else None
        named = f"`{param}`" if param else "A key"
        raise InvalidRequest("unknown_parameter", f"{named} is not a parameter of a fine-tuning job.", param=param)
    if body.integrations:
        raise InvalidRequest("not_supported", "Integrations are not supported.", param="integrations")
    if body.method is not None and body.method.type != "supervised":
        raise InvalidRequest("method_not_supported", "Only the method `supervised` is supported.", param="method.type")
    if body.method is not None and body.method.supervised is not None and body.hyperparameters is not None:
        raise InvalidRequest(
            "invalid_request", "Give hyperparameters in `method` or at the top, not in both.", param="hyperparameters"
        )
    _require_plain_text(body)
    adaptation_of(body)
    return body


def _require_plain_text(body: CreateJob) -> None:
    """Databases store neither U+0000 nor halves of surrogate pairs, which JSON can spell."""
    text = json.dumps(body.to_dict(), ensure_ascii=False)
    if "\\u0000" in text.replace("\\\\", "") or any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidRequest("invalid_request", "A string of the request is no valid text.")


def hyperparameters_param(body: CreateJob) -> str:
    """Where `hyperparameters_of` finds them."""
    in_method = body.method is not None and body.method.supervised is not None
    return "method.supervised.hyperparameters" if in_method else "hyperparameters"


def hyperparameters_of(body: CreateJob) -> Hyperparameters:
    """From whichever of the wire's two places holds them."""
    if body.method is not None and body.method.supervised is not None:
        return body.method.supervised.hyperparameters or Hyperparameters()
    return body.hyperparameters or Hyperparameters()


def batch_norm_not_trained(why: str) -> InvalidRequest:
    """Refuses GroupNorm in place of BatchNorm where nothing would learn what it changes. why: a sentence."""
    takers = [name for name, cls in ADAPTATIONS.items() if "batch_norm" in cls.__dataclass_fields__]
    return InvalidRequest(
        "batch_norm_not_trained",
        f"{why} GroupNorm in place of BatchNorm has to be trained: take one of {', '.join(takers)}.",
        param="adaptation.batch_norm",
    )


def adaptation_of(body: CreateJob) -> Adaptation | None:
    """The adaptation that was asked for; None: `auto`. Raises InvalidRequest."""
    if body.adaptation is None:
        return None
    fields = dict(body.adaptation)
    kind = fields.pop("type", "auto")
    if kind == "auto" and not fields:
        return None
    cls = ADAPTATIONS.get(kind) if isinstance(kind, str) else None
    if "batch_norm" in fields and (kind == "auto" or (cls and "batch_norm" not in cls.__dataclass_fields__)):
        raise batch_norm_not_trained(f"The adaptation `{kind}` does not take `batch_norm`.")
    if cls is None:
        raise InvalidRequest(
            "adaptation_not_supported", f"Adaptations are auto, {', '.join(ADAPTATIONS)}.", param="adaptation.type"
        )
    known = [field.name for field in dataclasses.fields(cls)]
    for key in fields:
        if key not in known:
            raise InvalidRequest(
                "unknown_parameter",
                f"The adaptation `{cls.type}` takes {', '.join(known) or 'no parameters'}.",
                param=f"adaptation.{key}" if _NAME.fullmatch(key) else "adaptation",
            )
    try:
        return TypeAdapter(cls).validate_python(fields)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        # A check of ours says what it wants; the words of another could quote the input.
        own = first.get("ctx", {}).get("error") if first["type"] == "value_error" else None
        at_fault = [str(part) for part in first["loc"][:1]] or [name for name in known if str(own).startswith(name)]
        param = ".".join(["adaptation", *at_fault])
        why = f"`{cls.type}`: {own}." if own else f"`{param}` is of another type than it should be."
        raise InvalidRequest("invalid_adaptation", why, param=param) from None
