"""Landlock for real: in a child process, since it cannot be taken back. What the worker's own programs reach under it:
tests/worker/test_reach.py."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest

from app.tether import importable
from worker.trainer import landlock
from worker.trainer.landlock import Reach

#: Of this kernel's Landlock. 2: renames from folder to folder are its matter, 3: truncation, 6: signals.
VERSION = ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1) if sys.platform == "linux" else 0

pytestmark = pytest.mark.skipif(VERSION < 1, reason="this kernel has no Landlock, or forbids it")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """As of a service, with a job, another job, and what else lies there."""
    for name in ("jobs/mine/own", "jobs/other/data/rows", "jobs/kept/data/rows", "privtune.db", "bases/tiny/weights"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("something")
    return tmp_path / "data"


class Closed:
    """A process that closed itself off and evaluates what it is told."""

    def __init__(self, folder: Path, reach: Reach = Reach(), before: str = "", **env: str) -> None:  # noqa: B008
        code = textwrap.dedent("""
            import errno, json, os, shutil, signal, subprocess, sys, threading
            from pathlib import Path
            from worker.trainer import landlock
            def attempt(call, *arguments):
                try:
                    call(*arguments)
                except OSError as error:
                    return errno.errorcode[error.errno]
                return "allowed"
            for line in sys.stdin:
                print(json.dumps(eval(line)), flush=True)
        """)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=importable({**os.environ, **reach.to_env(), **env}),
            text=True,
        )
        if before:
            self(before)
        self.whole = self(f"landlock.close(Path({str(folder)!r}), landlock.Reach.from_env())")

    def __call__(self, expression: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(expression + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def attempt(self, call: str, *arguments: object) -> str:
        """The error's name, or `allowed`."""
        return str(
            self(
                f"attempt({', '.join((call, *(repr(str(a)) if isinstance(a, Path) else repr(a) for a in arguments)))})"
            )
        )

    def __enter__(self) -> Closed:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(20) == 0
        self._process.stdout.close()


def test_nothing_beside_its_folder_can_be_read_listed_or_changed(data_dir: Path) -> None:
    jobs, other, kept = data_dir / "jobs", data_dir / "jobs/other/data/rows", data_dir / "jobs/kept/data/rows"
    with Closed(jobs / "mine") as closed:
        assert closed.whole is True
        for path in (other, kept, data_dir / "privtune.db"):
            for how in ("r", "w", "a"):
                assert closed.attempt("open", path, how) == "EACCES"
            if VERSION >= 3:
                assert closed.attempt("os.truncate", path, 0) == "EACCES"
            assert closed.attempt("os.unlink", path) == "EACCES"
            assert closed.attempt("os.rename", path, jobs / "mine/taken") in ("EACCES", "EXDEV")
            assert closed.attempt("os.link", path, jobs / "mine/taken") in ("EACCES", "EXDEV")
            assert path.read_text() == "something"
        for path in (jobs, data_dir, jobs / "other", jobs / "kept/data", Path("/"), Path("/tmp"), Path("/dev")):
            assert closed.attempt("os.listdir", path) == "EACCES"
        for path in (jobs / "new", data_dir / "new", Path("/tmp/privtune-new"), Path("/dev/shm/../new")):
            assert closed.attempt("open", path, "w") == "EACCES"
            assert closed.attempt("os.mkdir", path) == "EACCES"
        assert closed.attempt("os.rename", jobs / "mine/own", jobs / "own") in ("EACCES", "EXDEV")


def test_its_own_folder_is_whole_and_what_is_moved_into_it_later_too(data_dir: Path) -> None:
    mine = data_dir / "jobs/mine"
    with Closed(mine) as closed:
        assert closed(f"Path({str(mine / 'own')!r}).read_text()") == "something"
        for call in ("open", "os.mkdir"):
            assert closed.attempt(call, mine / call, *(["w"] if call == "open" else [])) == "allowed"
        assert closed.attempt("os.rename", mine / "open", mine / "moved") == "allowed"
        if VERSION >= 2:
            assert closed.attempt("os.rename", mine / "moved", mine / "os.mkdir/moved") == "allowed"
        assert closed.attempt("shutil.rmtree", mine / "os.mkdir") == "allowed"
        assert closed("[os.environ['HOME'], os.environ['TMPDIR']]") == [str(mine)] * 2
        (data_dir / "jobs/kept/data").rename(mine / "data")
        assert closed(f"Path({str(mine / 'data/rows')!r}).read_text()") == "something"
        # What the worker would follow, wait for or run.
        assert closed.attempt("os.symlink", data_dir, mine / "link") == "EACCES"
        assert closed.attempt("os.mkfifo", mine / "pipe") == "EACCES"
        assert closed.attempt("os.mknod", mine / "disk", 0o60600, 1 << 8) in ("EACCES", "EPERM")
        (mine / "program").write_text("#!/bin/sh\n")
        (mine / "program").chmod(0o700)
        assert closed.attempt("subprocess.run", [str(mine / "program")]) == "EACCES"


def test_it_reads_bases_and_what_programs_need_and_writes_none_of_it(data_dir: Path) -> None:
    weights = data_dir / "bases/tiny/weights"
    with Closed(data_dir / "jobs/mine", Reach((data_dir / "bases",), (data_dir,))) as closed:
        (data_dir / "jobs/mine/link").symlink_to(weights)
        assert closed(f"Path({str(data_dir / 'jobs/mine/link')!r}).read_text()") == "something"
        assert closed.attempt("os.listdir", weights.parent) == "allowed"
        (data_dir / "bases/later").write_text("")
        assert closed.attempt("open", data_dir / "bases/later") == "allowed"
        for path in (weights, Path(landlock.__file__), Path(os.__file__)):
            assert closed.attempt("open", path) == "allowed"
            assert closed.attempt("open", path, "a") == "EACCES"
        for path in ("/etc/passwd", "/proc/self/status", "/proc/meminfo", "/sys/devices/system/cpu/online"):
            assert closed.attempt("open", path) == "allowed"
        for path in ("/dev/null", "/dev/zero"):
            assert closed.attempt("open", path, "r+b", 0) == "allowed"
        assert closed.attempt("open", data_dir / "privtune.db") == "EACCES"
        assert (
            closed("subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True).stdout.decode()") == "1\n"
        )
    with Closed(data_dir / "jobs/mine") as closed:
        assert closed.attempt("open", weights) == "EACCES"


def test_threads_and_children_of_a_closed_process_are_closed(data_dir: Path) -> None:
    database = str(data_dir / "privtune.db")
    with Closed(data_dir / "jobs/mine") as closed:
        closed("globals().update(found=[])")
        closed(f"threading.Thread(target=lambda: found.append(attempt(open, {database!r}))).start()")
        child = f"print(1)\ntry: open({database!r})\nexcept OSError as error: print(error.errno)"
        run = f"subprocess.run([sys.executable, '-c', {child!r}], capture_output=True, text=True)"
        closed(f"found.append({run}.stdout)")
        assert closed("found") == ["EACCES", "1\n13\n"]


def test_it_cannot_go_by_another_process_nor_end_one(data_dir: Path) -> None:
    with Closed(data_dir / "jobs/mine") as closed:
        for name in ("root/etc/passwd", "cwd/README.md", "fd/0", "mem"):
            assert closed.attempt("open", f"/proc/{os.getpid()}/{name}") == "EACCES"
        if VERSION >= 6:
            assert closed.attempt("os.kill", os.getpid(), 0) == "EPERM"
        assert closed.attempt("os.kill", closed("os.getpid()"), 0) == "allowed"


def test_a_process_that_has_threads_already_is_not_said_to_be_closed(data_dir: Path) -> None:
    thread = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
    with Closed(data_dir / "jobs/mine", before=thread) as closed:
        assert closed.whole is False
        assert closed.attempt("open", data_dir / "privtune.db") == "EACCES", "what holds for one thread is done"
        assert closed("os.environ.get('PRIVTUNE_CLOSED')") is None


def test_it_is_closed_once_and_its_children_know(data_dir: Path) -> None:
    """A second layer would leave less of what the first one left, and part a rank from the one that started it."""
    with Closed(data_dir / "jobs/mine") as closed:
        assert closed("os.environ['PRIVTUNE_CLOSED']") == "1"
        assert closed("landlock.close(Path('/nowhere'), landlock.Reach())") is True
        assert closed.attempt("open", data_dir / "jobs/mine/own", "a") == "allowed"


def test_a_data_folder_in_what_is_needed_stays_closed(tmp_path: Path) -> None:
    """As of `serve --data-dir ./privtune-data` in a folder that Python imports from, or of models beside the data."""
    root = tmp_path / "root"
    for name in ("data/jobs/mine/own", "data/privtune.db", "package/module.py", "deep/er/file", "deep/data/rows"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("something")
    (root / "round").symlink_to(root / "data")
    for reach, env in (
        (Reach((root,), (root / "data", root / "deep/data")), {}),
        (Reach((), (root / "data", root / "deep/data")), {"PYTHONPATH": str(root)}),
        (Reach((), (root / "data", root / "deep/data")), {"LD_LIBRARY_PATH": str(root)}),
    ):
        with Closed(root / "data/jobs/mine", reach, **env) as closed:
            for name in ("package/module.py", "deep/er/file", "data/jobs/mine/own"):
                assert closed.attempt("open", root / name) == "allowed"
            for name in ("data/privtune.db", "deep/data/rows", "round/privtune.db"):
                assert closed.attempt("open", root / name) == "EACCES"
            for name in ("", "data", "data/jobs", "deep", "deep/data", "round"):
                assert closed.attempt("os.listdir", root / name) == "EACCES"
    with Closed(root / "data/jobs/mine", Reach((root / "data",), (root / "data",))) as closed:
        assert closed.attempt("open", root / "data/privtune.db") == "EACCES"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no memory that processes share")
def test_a_data_folder_in_shared_memory_stays_closed() -> None:
    """Which is in reach otherwise, for ranks to share what they send."""
    with tempfile.TemporaryDirectory(prefix="privtune-", dir="/dev/shm") as made:
        root, database = Path(made), Path(made) / "privtune.db"
        database.write_text("something")
        for name in ("mine", "other"):
            (root / "jobs" / name).mkdir(parents=True)
            (root / "jobs" / name / "own").write_text("something")
        with Closed(root / "jobs/mine", Reach((), (root,))) as closed:
            assert closed.whole is True
            for path in (database, root / "jobs/other/own"):
                assert [closed.attempt("open", path, how) for how in "ra"] == ["EACCES"] * 2
                assert closed.attempt("os.unlink", path) == "EACCES"
            assert closed.attempt("open", root / "jobs/mine/own", "a") == "allowed"
        with Closed(root / "jobs/mine", Reach((), (root / "jobs",))) as closed:
            assert closed.attempt("open", database) == "EACCES"
        with tempfile.TemporaryDirectory() as elsewhere, Closed(Path(elsewhere)) as closed:
            assert closed.attempt("open", root / "segment", "x") == "allowed"


def test_a_checkout_that_changed_just_before_is_imported_from(data_dir: Path) -> None:
    """Python lists a folder again that is newer than its list, and takes one that it may not list for an empty one."""
    code = f"""
        import os, sys
        from pathlib import Path
        from worker.trainer import landlock
        os.utime({str(Path(landlock.__file__).parents[2])!r})
        landlock.close(Path({str(data_dir / "jobs/mine")!r}), landlock.Reach())
        from app.privacy.plan import PrivacyPlan
        from worker.trainer.failure import TrainerFailure
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    subprocess.run(command, env=importable(os.environ), check=True)


def test_of_a_checkout_only_the_packages_are_in_reach(data_dir: Path) -> None:
    checkout = Path(landlock.__file__).parents[2]
    assert (checkout / "pyproject.toml").exists(), "tests run from one"
    with Closed(data_dir / "jobs/mine") as closed:
        assert closed.attempt("open", checkout / "README.md") == "EACCES"
        assert closed.attempt("os.listdir", checkout) == "EACCES"
        assert closed.attempt("open", checkout / "app/ids.py") == "allowed"


def test_a_folder_that_another_one_replaced_is_another(data_dir: Path) -> None:
    reach = Reach((data_dir / "bases", data_dir / "missing"))
    before = reach.identity()
    assert [path for path, *_ in before] == [str(data_dir / "bases")]
    (data_dir / "bases/new").mkdir()
    assert reach.identity() == before
    (data_dir / "bases").rename(data_dir / "old")
    (data_dir / "bases").mkdir()
    assert reach.identity() != before
    (data_dir / "missing").mkdir()
    assert len(reach.identity()) == 2


def test_a_spec_names_its_base_and_where_links_in_it_lead(data_dir: Path) -> None:
    mine, weights = data_dir / "jobs/mine", data_dir / "bases/tiny/weights"
    assert landlock.named_by(mine / "spec.json") == ()
    (mine / "base").mkdir()
    (mine / "base/weights").symlink_to(weights)
    (mine / "spec.json").write_text(json.dumps({"base": {"path": str(mine / "base")}}))
    assert landlock.named_by(mine / "spec.json") == (mine / "base", weights)
    for broken in ("no json", "[]", "{}", '{"base": {"path": 1}}', '{"base": {"path": "/nowhere"}}'):
        (mine / "spec.json").write_text(broken)
        assert landlock.named_by(mine / "spec.json") == ()
