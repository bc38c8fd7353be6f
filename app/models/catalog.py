"""Base models on this machine: which there are, and where their files lie."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from app.catalog.bases import BASES, BaseModel
from app.db.session import Database
from app.errors import InvalidRequest
from app.models import digests, discovery, repository
from app.models.folder_reader import WEIGHTS, Refused
from app.models.lineage import lineage_of
from app.models.tables import Model
from app.models.weights import read_header
from app.settings import Settings


class BaseModelUnavailable(LookupError):
    """The files of the base are not there, or they are not what the catalog, or the job's plan, says."""


def bases(settings: Settings) -> list[BaseModel]:
    """All that this server offers to every project: packages, then the operator's folder. Of a model that was just put
    there, the digest is empty until its weights are hashed, which this begins in the background."""
    return [base for base in BASES.values() if package_path(base) is not None] + list(_discovered(settings))


def _discovered(settings: Settings) -> Iterator[BaseModel]:
    if settings.models_dir is not None:
        for found in discovery.scan(settings.models_dir).models.values():
            try:
                yield discovery.base_now(found, settings.data_dir)
            except OSError:
                continue  # it went away under us


def refused(settings: Settings) -> dict[str, Refused]:
    """Folders of models that are not offered, and why."""
    return {} if settings.models_dir is None else dict(discovery.scan(settings.models_dir).refused)


def offers(settings: Settings, name: str) -> bool:
    """Whether a base of that id is offered to every project. Hashes nothing."""
    return name in BASES or (settings.models_dir is not None and name in discovery.scan(settings.models_dir).models)


def find_base(settings: Settings, name: str) -> BaseModel | None:
    """The base of that id, offered to every project, with its digest: the first call after it was put there hashes its
    weights, so none belongs in a unit of work. Raises InvalidRequest: hub_not_available, base_model_refused with the
    reason.
    """
    if name in BASES:
        return dataclasses.replace(BASES[name], parameter_names=_parameter_names(name))
    if "@" in name:
        raise InvalidRequest(
            "hub_not_available",
            "This service fetches no models itself: an operator does, by `privtune models fetch`, and the id has then "
            "no revision.",
            param="model",
        )
    if settings.models_dir is None:
        return None
    scanned = discovery.scan(settings.models_dir)
    if name in scanned.refused:
        reason = scanned.refused[name]
        raise InvalidRequest(
            "base_model_refused", f"This base model cannot be used: {reason}.", param="model", reason=reason.code
        )
    found = scanned.models.get(name)
    return None if found is None else discovery.base_of(found, settings.data_dir)


def find_base_for(database: Database, settings: Settings, project_id: str, name: str) -> BaseModel | None:
    """The base of that id for a job of the project: one of the above, or a model that the project's jobs made.

    Raises InvalidRequest: hub_not_available, base_model_refused, model_not_a_base.
    """
    if not name.startswith(discovery.FINE_TUNED):
        return find_base(settings, name)
    with database.reading() as session:
        model = repository.find(session, project_id, name)
    return None if model is None else as_base(model)


def as_base(model: Model) -> BaseModel:
    """A fine-tuned model, to be trained further. Raises InvalidRequest `model_not_a_base` where it cannot be."""
    if model.base_facts is None:
        raise InvalidRequest(
            "model_not_a_base", "This model does not hold whole weights that could be trained further.", param="model"
        )
    facts = {**model.base_facts, "id": model.id, "source": "fine_tuned"}
    return BaseModel.from_dict({**facts, "lineage": lineage_of(model.id, model.privacy_report)})


def base_path(base: BaseModel) -> Path:
    """The folder of a package's base, its weights checked against the catalog's digest.

    The package is found, never imported: none of its code runs. Raises BaseModelUnavailable.
    """
    folder = package_path(base)
    if folder is None:
        raise BaseModelUnavailable(f"the package {base.package} is not installed")
    if digests.sha256(folder / WEIGHTS) != base.digest:
        raise BaseModelUnavailable(f"the weights of {base.id} are not the catalog's")
    return folder


@cache  # a package does not change under a service that runs
def _parameter_names(name: str) -> tuple[str, ...]:
    """Of a package's weights; none where it is missing or its weights are still to be converted."""
    base = BASES[name]
    folder = package_path(base)
    if folder is None or base.conversion:
        return ()
    return tuple(read_header(folder / WEIGHTS))


def package_path(base: BaseModel) -> Path | None:
    """Where an installed package carries the base: the folder, or the file that is to be converted."""
    found = importlib.util.find_spec(base.package) if base.package.isidentifier() else None
    for location in (found.submodule_search_locations or ()) if found else ():
        path = Path(location) / base.path
        if (path if base.conversion else path / WEIGHTS).is_file():
            return path
    return None
