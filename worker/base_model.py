"""A job's base, laid out for its trainer: exactly the files that the job was planned with, and no others.

A trainer reads a package's folder as it is, the catalog pins it; weights in another form are converted once, by a
process in the trainer's sandbox, and kept in the data folder. Of an operator's folder it gets the rewritten small
files and links to the weights; of a fine-tuned model, a copy of the published bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from app import tether
from app.catalog.bases import BaseModel
from app.errors import ApiError
from app.models import digests, discovery, folder_reader, model_folder
from app.models import service as models
from app.settings import Settings
from worker import job_folder, reach
from worker.trainer.spec import BASE_FOLDER, BaseSpec
from worker.trainer_process import PASSED_ON
from worker.workplace import Workplace

#: Importing torch takes most of it.
_CONVERSION_SECONDS = 600


class Pinned(Protocol):
    """What needs a base: a job, or an export of its model. model: the base's id. resolved: as of the job."""

    @property
    def project_id(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def resolved(self) -> Mapping[str, Any]: ...


def lay_out(workplace: Workplace, claimed: Pinned, folder: Path) -> BaseSpec:
    """folder: the job's. Raises BaseModelUnavailable where the base is gone or is not what it was at the submit."""
    base = _planned(workplace.settings, claimed)
    into = folder / BASE_FOLDER
    match base.source:
        case "package" if base.conversion:
            into = converted(workplace.settings, base)
        case "package":
            into = models.base_path(base)
        case "folder":
            into.mkdir()
            _copy(workplace.settings, base, into)
        case "fine_tuned":
            _fetch(workplace, claimed, base, into)
        case _:
            raise models.BaseModelUnavailable(f"no files come from {base.source}")
    return BaseSpec(base.id, base.family, str(into), base.licence, base.lineage)


def _planned(settings: Settings, claimed: Pinned) -> BaseModel:
    """The base as the plan pinned it, and where its files are today."""
    stored = claimed.resolved.get("base")
    try:
        found = None if _is_fine_tuned(claimed.model) else models.find_base(settings, claimed.model)
    except ApiError as refused:
        raise models.BaseModelUnavailable(refused.message) from refused
    if stored is None or found is None:  # a job of an older version, or a fine-tuned base
        base = found if stored is None else BaseModel.from_dict(stored)
        if base is None or (found is None and base.source != "fine_tuned"):
            raise models.BaseModelUnavailable(f"{claimed.model} is not there any more")
        return base
    planned = BaseModel.from_dict(stored)
    if (planned.digest, planned.files_digest) != (found.digest, found.files_digest):
        raise models.BaseModelUnavailable(f"the files of {claimed.model} have changed since the submit")
    return dataclasses.replace(planned, conversion=found.conversion, package=found.package, path=found.path)


def _is_fine_tuned(name: str) -> bool:
    return name.startswith(discovery.FINE_TUNED)


def converted(settings: Settings, base: BaseModel) -> Path:
    """The folder that a package's weights were converted to, now or before. Raises BaseModelUnavailable."""
    source = models.package_path(base)
    if source is None:
        raise models.BaseModelUnavailable(f"the package {base.package} is not installed")
    root = reach.conversions(settings)
    target = root / f"{base.id}-{base.digest[:16]}"
    if not target.exists():
        with tempfile.TemporaryDirectory(prefix=".", dir=root) as scratch:
            made = Path(scratch) / "model"
            within = dataclasses.replace(reach.of_children(settings), read=(source,))
            env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
            env |= {"HOME": scratch, **within.to_env()}
            command = tether.python("-m", "worker.trainer.convert", base.conversion, str(source), str(made))
            try:
                subprocess.run(  # noqa: S603
                    command,
                    env=tether.importable(env),
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=_CONVERSION_SECONDS,
                    check=True,
                )
            except subprocess.SubprocessError as error:
                raise models.BaseModelUnavailable(f"the weights of {base.id} cannot be converted") from error
            with contextlib.suppress(OSError):  # another worker was quicker
                made.rename(target)
    if digests.sha256(target / folder_reader.WEIGHTS) != base.digest:
        raise models.BaseModelUnavailable(f"what {base.package} came out as is not what the catalog says")
    return target


def _copy(settings: Settings, base: BaseModel, into: Path) -> None:
    assert settings.models_dir is not None
    try:
        found = model_folder.inspect(Path(base.path), settings.models_dir, base.id, base.source)
        digest = found.digest(lambda path: digests.sha256(path, settings.data_dir))
    except (folder_reader.Refused, OSError) as error:
        raise models.BaseModelUnavailable(f"{base.id} cannot be read any more") from error
    if (digest, found.base.files_digest) != (base.digest, base.files_digest):
        raise models.BaseModelUnavailable(f"the files of {base.id} have changed since the submit")
    for name, content in found.small.items():
        (into / name).write_bytes(content)
    for name, path in found.weights.items():
        (into / name).symlink_to(path)


def _fetch(workplace: Workplace, claimed: Pinned, base: BaseModel, into: Path) -> None:
    with workplace.database.reading() as session:
        try:
            model = models.get(session, claimed.project_id, base.id)
        except ApiError as gone:
            raise models.BaseModelUnavailable(f"{base.id} was deleted") from gone
        prefix, digests_of = (
            model.storage_prefix,
            {file["path"]: file["sha256"] for file in model.files if file["path"] in model_folder.READABLE},
        )
    try:
        job_folder.get_folder(workplace.storage, prefix, digests_of, into)
    except job_folder.DamagedCheckpoint as error:
        raise models.BaseModelUnavailable(f"{base.id} is damaged in the store") from error
