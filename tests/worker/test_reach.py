"""What the worker's own programs can reach of its host, as they run for a job, an export, a conversion.

A `sitecustomize` on their PYTHONPATH looks at places when torch is imported, before any model is loaded, and at the
end, and tells on standard error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.models import service as models
from app.settings import Settings
from tests.trainer.jobs import KEY, make_base, make_job
from tests.trainer.test_landlock import pytestmark as needs_landlock
from tests.worker.test_conversion import LITE0
from worker import base_model, exports, job_folder, layout
from worker import reach as reaches
from worker.exporter.spec import ExportSpec
from worker.spares import Spares
from worker.trainer.control import Control
from worker.trainer.landlock import Reach
from worker.trainer.messages import Allowed, Message, Notice, Rows
from worker.trainer.run import run
from worker.trainer_process import TrainerGone, TrainerProcess

_SPY = """
import atexit, errno, json, os, sys, time
def look(when):
    while not os.path.exists(places := os.path.join(os.path.dirname(__file__), "places.json")):
        time.sleep(0.02)
    found = []
    for place in json.load(open(places)):
        try:
            os.listdir(place) if os.path.isdir(place) else open(place).close()
            found.append([place, "read"])
        except OSError as error:
            found.append([place, errno.errorcode[error.errno]])
    os.write(2, ("LOOKED " + json.dumps([when, os.getpid(), found]) + "\\n").encode())
def heard(event, arguments):
    if event == "import" and arguments[0] == "torch" and not looked:
        looked.append("torch")
        look("torch")
looked = []
sys.addaudithook(heard)
atexit.register(look, "end")
"""

Spy = Callable[..., None]


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A short path, as of a socket. What lies in it is a service's."""
    with tempfile.TemporaryDirectory(prefix="pt-") as made:
        path = Path(made) / "data"
        for name in ("privtune.db", "secret_key", "storage/project/files/rows.parquet", "jobs/other/data/rows"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("something")
        yield path


@pytest.fixture
def spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Has programs that start from here on look at places, once they are told which."""
    folder = tmp_path / "spy"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SPY)
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def on(*places: Path) -> None:
        (folder / "told").write_text(json.dumps([*map(str, places)]))
        (folder / "told").rename(folder / "places.json")

    return on


def _looked(text: str) -> list[tuple[str, int, dict[str, str]]]:
    """(when, process, what became of each place)."""
    lines = (line.partition("LOOKED ")[2] for line in text.splitlines())
    return [(when, pid, dict(found)) for when, pid, found in map(json.loads, filter(None, lines))]


def _folder_of(trainer: TrainerProcess, made: Path) -> Path:
    """The trainer's, with what lies in `made`, but for the rows."""
    folder = trainer.folder.path
    shutil.copytree(made, folder, dirs_exist_ok=True)
    (kept := job_folder.kept_back_from(folder)).mkdir()
    (folder / "data").rename(kept / "data")
    return folder


def _to_its_end(trainer: TrainerProcess) -> list[Message]:
    """What it says; it is given the rows, as a job's trainer is."""
    heard: list[Message] = []
    try:
        while True:
            for message in trainer.read(1.0):
                heard.append(message)
                if message.type == "ready":
                    layout.give_rows(trainer.folder.path)
                    trainer.tell(Rows())
                    trainer.tell(Allowed(10**6))
    except TrainerGone:
        trainer.process.wait(60)
        return heard


@needs_landlock
def test_a_job_reaches_its_base_and_its_rows_once_they_are_given_and_nothing_else_on_any_rank(
    data_dir: Path, spy: Spy
) -> None:
    base = make_base(data_dir / "bases/tiny")
    made = make_job(data_dir / "made", base, steps=2, evaluation="none")
    runtime = dataclasses.replace(made.spec.runtime, ranks=2)
    dataclasses.replace(made.spec, runtime=runtime).write(made.folder)
    trainer = TrainerProcess(data_dir / "jobs", reach=Reach((data_dir / "bases",), (data_dir,)), threads=1)
    try:
        folder = _folder_of(trainer, made.folder)
        waiting = job_folder.kept_back_from(folder) / "waiting"
        waiting.write_text("something")
        shut = [data_dir, data_dir / "privtune.db", data_dir / "secret_key", data_dir / "jobs", waiting.parent, waiting]
        shut += [data_dir / "jobs/other/data/rows", data_dir / "storage/project/files/rows.parquet"]
        shut += [Path("/proc", str(os.getpid()), "root", "etc", "passwd"), waiting.parent / "data/training.parquet"]
        spy(*shut, base / "config.json", folder / "spec.json")
        trainer.begin(KEY)
        assert _to_its_end(trainer)[-1].type == "finished"
        looked = _looked((folder / "trainer.log").read_text())
    finally:
        trainer.close()
    ranks = {pid for _, pid, _ in looked}
    assert len(ranks) == 2
    assert {(when, pid) for when, pid, _ in looked} == {(when, pid) for when in ("torch", "end") for pid in ranks}
    for when, pid, found in looked:
        rows = found.pop(str(shut[-1]))
        assert rows == ("ENOENT" if when == "end" else "EACCES")
        assert [found.pop(str(path)) for path in (base / "config.json", folder / "spec.json")] == ["read"] * 2
        assert set(found.values()) == {"EACCES"}, (when, pid, found)


_WITHOUT_LANDLOCK = """
import platform, sys
from worker.trainer import sandbox
machine = platform.machine()
whole = sandbox._MACHINES[machine]
sandbox._MACHINES[machine] = (*whole[:2], (444,))  # landlock_create_ruleset
assert sandbox.enter_sandbox()
sandbox._MACHINES[machine] = whole
from worker.trainer.__main__ import main
sys.exit(main([]))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="seccomp as on Linux")
def test_where_there_is_no_landlock_the_job_runs_and_says_so(data_dir: Path) -> None:
    made = make_job(data_dir / "made", make_base(data_dir / "bases/tiny"), steps=2, evaluation="none")
    program = [sys.executable, "-P", "-c", _WITHOUT_LANDLOCK]
    trainer = TrainerProcess(data_dir / "jobs", threads=1, program=program)
    try:
        _folder_of(trainer, made.folder)
        trainer.begin(KEY)
        heard = _to_its_end(trainer)
    finally:
        trainer.close()
    assert Notice("files_in_reach") in heard
    assert Notice("sandbox_unavailable") not in heard
    assert heard[-1].type == "finished"


@needs_landlock
def test_an_export_reaches_its_model_and_nothing_else(data_dir: Path, spy: Spy) -> None:
    made = make_job(data_dir / "made", make_base(data_dir / "bases/tiny"), steps=2, evaluation="none")
    run(made.folder, KEY, Control(None))
    shut = [data_dir, data_dir / "privtune.db", data_dir / "jobs", data_dir / "jobs/other/data/rows"]
    exporter = TrainerProcess(data_dir / "jobs", reach=Reach((), (data_dir,)), threads=1, program=exports.PROGRAM)
    try:
        folder = exporter.folder.path
        spy(*shut, data_dir / "bases/tiny/config.json", folder)
        shutil.copytree(made.folder / "results/model", folder / "model")
        digest = job_folder.sha256(folder / "model/model.safetensors")
        ExportSpec("export", "model", "job", "tiny", "fp16", digest, threads=1).write(folder)
        exporter.begin(b"")
        assert _to_its_end(exporter)[-1].type == "finished"
        looked = _looked((folder / "trainer.log").read_text())
    finally:
        exporter.close()
    assert [when for when, *_ in looked] == ["torch", "end"]
    for _, _, found in looked:
        assert found.pop(str(folder)) == "read"
        assert set(found.values()) == {"EACCES"}, found


@needs_landlock
def test_a_conversion_reaches_what_it_converts_and_nothing_else(data_dir: Path, spy: Spy) -> None:
    source = models.package_path(LITE0)
    assert source is not None
    settings, shut = Settings(data_dir=data_dir), [data_dir, data_dir / "secret_key", data_dir / "converted"]
    spy(*shut, source)
    with pytest.raises(models.BaseModelUnavailable) as raised:
        base_model.converted(settings, dataclasses.replace(LITE0, conversion="of a kind that fails"))
    assert isinstance(raised.value.__cause__, subprocess.CalledProcessError)
    ((when, _, found),) = _looked(raised.value.__cause__.stderr.decode())
    assert when == "end"
    assert found.pop(str(source)) == "read"
    assert found == dict.fromkeys(map(str, shut), "EACCES")


def test_a_spare_that_knows_another_folder_of_models_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    spares = Spares(Settings(data_dir=tmp_path / "data", models_dir=tmp_path / "models"))
    try:
        spare = spares._spare
        assert spare is not None
        (tmp_path / "models/another").mkdir()
        assert spare.waits(), "what comes into it is in reach"
        (tmp_path / "models").rename(tmp_path / "old")
        (tmp_path / "models").mkdir()
        taken = spares.take()
        assert taken is not spare
        assert taken.waits()
        taken.close()
    finally:
        spares.close()


def test_children_reach_models_and_nothing_that_the_service_keeps_wherever_it_is(tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path / "data",
        models_dir=tmp_path / "models",
        database_url=f"sqlite:///{tmp_path / 'elsewhere/jobs.db'}",
        storage_url=(tmp_path / "a store").as_uri(),
    )
    reach = reaches.of_children(settings)
    assert reach.read == (tmp_path / "models", tmp_path / "data/converted")
    assert reach.read[1].is_dir(), "a spare reaches what comes into it"
    closed = {tmp_path / name for name in ("data", "elsewhere", "a store")}
    assert {*reach.closed} == closed | {job_folder.folders_root(settings)}
    plain = reaches.of_children(Settings(data_dir=tmp_path / "data", database_url="postgresql://host/name"))
    assert plain.read == (tmp_path / "data/converted",)


def test_where_rows_wait_only_their_worker_knows(tmp_path: Path) -> None:
    """A path that is known tells its file's size, in reach or not."""
    folder = job_folder.JobFolder.create(tmp_path)
    kept = job_folder.kept_back_from(folder.path)
    code = f"from worker.job_folder import *; print(kept_back_from(Path({str(folder.path)!r})))"
    other = Path(subprocess.check_output([sys.executable, "-c", code], text=True).strip())
    assert other.parent == kept.parent
    assert other != kept
    for path in (other, kept, kept.with_name(f"kept-{folder.path.name}")):  # the last as older workers called it
        path.mkdir()
        (path / "rows").write_text("something")
    folder.remove()
    assert os.listdir(tmp_path) == [".lock"], "whichever worker kept them"
