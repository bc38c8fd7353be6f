"""What of the file system a process can reach: Landlock (Linux 5.13), for it, its threads and its children, for good.

The kernel refuses to open what no rule allows. A rule is on a folder, and holds for whatever is beneath it, whenever it
comes there: a job's rows are in its trainer's reach once they were moved into its folder, and not before. It binds the
thread that asks for it and what that starts, so it comes first, before a library that starts threads; what is open
already stays open. Rules allow, none denies: where a folder that must stay closed lies in one that is needed, its
neighbours are allowed one by one.

It is about opening: of a file whose path is known, `stat` still tells the size. So nobody tells the path of rows that
wait. Python cannot ask for it itself, hence ctypes. <https://docs.kernel.org/userspace-api/landlock.html>
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import app.catalog  # noqa: F401 - `app`, while its folder can be listed: of a checkout that ends with `close`

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every machine
_CREATE_RULESET_VERSION, _RULE_PATH_BENEATH = 1, 1
_PR_SET_NO_NEW_PRIVS = 38

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = (1 << bit for bit in range(6, 13))
_REFER, _TRUNCATE, _IOCTL_DEV = (1 << bit for bit in range(13, 16))
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
#: By the version that brought them: a kernel refuses what it does not know.
_RIGHTS = {1: (1 << 13) - 1, 2: _REFER, 3: _TRUNCATE, 5: _IOCTL_DEV}
#: No signal to a process outside. (Abstract Unix sockets are left: NCCL's ranks under torchrun, each closed for itself,
#: meet by them, and no socket at all opens after the seccomp filter.)
_SCOPE_SIGNAL, _SCOPES_SINCE = 1 << 1, 6

_READ = _READ_FILE | _READ_DIR
_RUN = _READ | _EXECUTE
_DEVICE = _READ | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV
#: Segments in memory have made-up names, which nobody can list.
_SHARED = _READ_FILE | _WRITE_FILE | _TRUNCATE | _MAKE_REG | _REMOVE_FILE
#: What is written there is not run. (No link, pipe or device: the worker reads what is there.)
_OWN = _READ | _SHARED | _REMOVE_DIR | _MAKE_DIR | _MAKE_SOCK | _REFER

#: What the C library, other libraries and a GPU's driver are made of, and what they ask. (Not /run: secrets are mounted
#: there.)
_PROGRAMS = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store"),
    *("/opt/cuda*", "/opt/nvidia*", "/opt/rocm*"),
)
_FACTS = ("/etc", "/proc", "/sys", "/run/nvidia*")
#: By name: among the others are disks, which root could read.
_DEVICES = ("null", "zero", "full", "random", "urandom", "dri", "dxg", "kfd", "nvidia*", "nvgpu", "nvhost*", "nvmap")

_REACH, _CLOSED = "PRIVTUNE_REACH", "PRIVTUNE_CLOSED"
_SOURCE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Reach:
    """What a process reaches beside its own folder, Python and the system: `read`, where base models lie. closed: what
    it does not, wherever it lies."""

    read: tuple[Path, ...] = ()
    closed: tuple[Path, ...] = ()

    def to_env(self) -> dict[str, str]:
        """For the environment of a process that calls `close`."""
        return {_REACH: json.dumps([[*map(str, self.read)], [*map(str, self.closed)]])}

    @classmethod
    def from_env(cls) -> Reach:
        """The inverse, of this process; nothing where nobody gave it one."""
        read, closed = json.loads(os.environ.get(_REACH, "[[], []]"))
        return cls(tuple(map(Path, read)), tuple(map(Path, closed)))

    def identity(self) -> tuple[tuple[str, int, int], ...]:
        """Of what is read, as it is now: a rule is on an inode, and not on what comes in its place."""
        found = []
        for path in _allowed(self.read, self.closed):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((str(path), status.st_dev, status.st_ino))
        return tuple(found)


class _Attributes(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("rights", ctypes.c_uint64), ("parent", ctypes.c_int32))


def close(folder: Path, reach: Reach) -> bool:
    """Leaves this process `folder`, what `reach` names and what programs need; home and temporary files move into the
    folder. Whether that holds for the whole process: False without Landlock, or where other threads run already."""
    if os.environ.get(_CLOSED):  # by the first rank, which started this one: a layer of its own would part the two
        return True
    version = _syscall(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION) if sys.platform == "linux" else 0
    if version < 1:
        return False
    handled = sum(rights for since, rights in _RIGHTS.items() if since <= version)
    attributes = _Attributes(files=handled, scopes=_SCOPE_SIGNAL if version >= _SCOPES_SINCE else 0)
    ruleset = _syscall(_CREATE_RULESET, ctypes.byref(attributes), ctypes.sizeof(attributes), 0)
    if ruleset < 0:
        return False
    try:
        whole = all(_allow(ruleset, path, rights & handled) for path, rights in _rules(folder.resolve(), reach))
        if not whole or ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            return False
        alone = len(os.listdir("/proc/self/task")) == 1
        if _syscall(_RESTRICT_SELF, ruleset, 0) != 0:
            return False
    finally:
        os.close(ruleset)
    os.environ.update(HOME=str(folder), TMPDIR=str(folder), **({_CLOSED: "1"} if alone else {}))
    return alone


def named_by(spec: Path) -> tuple[Path, ...]:
    """The base that a job's spec.json names, and where links in its folder lead; nothing where there is no spec yet. It
    is read without what knows its format, which starts threads."""
    try:
        base = Path(json.loads(spec.read_text(encoding="utf-8"))["base"]["path"])
        return (base, *(path.resolve() for path in base.iterdir() if path.is_symlink()))
    except (OSError, ValueError, KeyError, TypeError):
        return ()  # what is wrong with it the attempt will tell


def _rules(folder: Path, reach: Reach) -> Iterator[tuple[Path, int]]:
    """Paths that are there, and what may be done with them and beneath them."""
    closed = (*reach.closed, folder.parent)
    libraries = map(Path, filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)))
    for paths, rights in (
        (_found(_PROGRAMS), _RUN),
        (_python(), _RUN),
        (libraries, _RUN),
        (_found(_FACTS), _READ),
        (reach.read, _READ),
    ):
        for path in _allowed(paths, closed):
            yield path, rights
    for path in _found(f"/dev/{name}" for name in _DEVICES):
        yield path, _DEVICE
    shared = Path("/dev/shm").resolve()  # noqa: S108 - there NCCL's ranks share what they send
    if not any(path.resolve().is_relative_to(shared) for path in closed):
        yield shared, _SHARED
    if os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg"):  # dxg: NVIDIA's, too, under Windows
        # cuInit writes to /proc/PID/task/TID/comm, and fails where it cannot; nobody knows PID of the ranks to come.
        yield Path("/proc"), _WRITE_FILE
    yield folder, _OWN


def _found(patterns: Iterable[str]) -> Iterator[Path]:
    return (Path(found) for pattern in patterns for found in glob(pattern))


def _python() -> Iterator[Path]:
    """Where this interpreter and all that it can import lie."""
    yield from map(Path, (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.executable))
    checkout = (_SOURCE / "pyproject.toml").exists()  # where much else may lie, too
    if checkout:
        yield from (_SOURCE / "app", _SOURCE / "worker")
    for entry in filter(None, sys.path):
        if not (checkout and Path(entry).resolve() == _SOURCE):
            yield Path(entry)


def _allowed(paths: Iterable[Path], closed: Iterable[Path]) -> Iterator[Path]:
    """`paths`, as far as they are there; of one in which a closed one lies, all that is beside the way to that. One
    that lies in a closed one itself was asked for."""
    apart = tuple(path.resolve() for path in closed)
    for path in dict.fromkeys(path.resolve() for path in paths):
        if path.exists() and path.parent != path:
            yield from _around(path, apart)


def _around(path: Path, closed: tuple[Path, ...]) -> Iterator[Path]:
    if path in closed:
        return
    if not any(each.is_relative_to(path) for each in closed):
        yield path
        return
    with contextlib.suppress(OSError):  # one that we may not look into
        for entry in path.iterdir():
            if not entry.is_symlink():  # which leads to what is allowed, or not, by where that is
                yield from _around(entry, closed)


def _allow(ruleset: int, path: Path, rights: int) -> bool:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return True  # nothing there that could be reached
    try:
        rule = _PathBeneath(rights if path.is_dir() else rights & _OF_FILES, parent)
        return _syscall(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0) == 0
    finally:
        os.close(parent)


def _syscall(number: int, *arguments: object) -> int:
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return int(call(*(ctypes.c_long(word) if isinstance(word, int) else word for word in (number, *arguments))))
