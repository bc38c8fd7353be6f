"""`privtune models`: what this server offers as base models, why a folder is refused, and fetching one from a hub.

The service itself never talks to a hub: only an operator fetches, by hand, one pinned revision at a time, into the
folder of models. From then on it is a folder like any other.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from app.models import folder_reader, model_folder
from app.models import service as models
from app.settings import Settings

#: Organisation/name at a commit: a branch or a tag may be moved.
_PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,95})/([A-Za-z0-9][A-Za-z0-9._-]{0,95})@([0-9a-f]{40})")

#: What is fetched: what a trainer may read, the weights in several files, the model card.
PATTERNS = (
    *sorted(model_folder.READABLE),
    "model-*-of-*.safetensors",
    folder_reader.INDEX,
    "modules.json",
    "README.md",
)


def add_commands(commands: Any) -> None:
    """The commands, for `app.cli`."""
    verbs = commands.add_parser("models", help="base models: list them, fetch one from a hub").add_subparsers(
        required=True, metavar="VERB"
    )
    show = verbs.add_parser("list", help="what is offered, and which folders are refused, with the reason")
    show.set_defaults(run=_list)
    fetch = verbs.add_parser("fetch", help="fetch ORGANISATION/NAME@COMMIT into PRIVTUNE_MODELS_DIR")
    fetch.add_argument("model", help="with the full commit, 40 hexadecimal digits")
    fetch.add_argument("--endpoint", help="of the hub (HF_ENDPOINT)")
    fetch.set_defaults(run=_fetch)


def _list(_arguments: argparse.Namespace) -> int:
    settings = Settings()
    for name in [base.id for base in models.bases(settings)]:
        base = models.find_base(settings, name)
        assert base is not None
        print(f"{base.id}  {base.family}  {base.parameters:,} parameters  {base.licence}  sha256:{base.digest}")
    for name, reason in models.refused(settings).items():
        print(f"{name}  refused  {reason.code}: {reason}")
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    root = Settings().models_dir
    pinned = _PINNED.fullmatch(arguments.model)
    if root is None:
        raise ValueError("set PRIVTUNE_MODELS_DIR to the folder that models are kept in")
    if pinned is None or ".." in arguments.model:
        raise ValueError("name a model as ORGANISATION/NAME@COMMIT, with all 40 digits of the commit")
    target = fetch(root, f"{pinned[1]}/{pinned[2]}", pinned[3], arguments.endpoint)
    print(f"{target.relative_to(root)}")
    return 0


def fetch(root: Path, repository: str, commit: str, endpoint: str | None = None) -> Path:
    """Downloads one commit to `root / repository`, unless what came is no model that would be offered.

    Only safetensors and plain files are asked for. Raises ValueError: it is there already, it cannot be had, or it is
    refused.
    """
    try:
        from huggingface_hub import snapshot_download  # only who fetches needs it
    except ImportError:
        raise ValueError("fetching needs the package huggingface_hub") from None
    target = root / repository
    if target.exists():
        raise ValueError(f"{target} is there already: remove it first")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as scratch:
        folder = Path(scratch) / "model"
        try:
            snapshot_download(
                repository,
                revision=commit,
                local_dir=folder,
                allow_patterns=list(PATTERNS),
                endpoint=endpoint,
                token=False,
            )
        except Exception as error:  # whatever its HTTP library raises
            raise ValueError(f"the hub did not give {repository}@{commit}: {type(error).__name__}") from error
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        try:
            model_folder.inspect(folder, folder, repository)
        except folder_reader.Refused as reason:
            raise ValueError(f"{repository} is refused: {reason.code}: {reason}") from reason
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
    return target
