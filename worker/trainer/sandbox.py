"""What the trainer gives up before it touches data: the network, new privileges, and being read by other processes.
(And files: `landlock`, which comes first.)

A seccomp filter makes every `socket` call fail with EPERM (the control socket is connected before), and with it
io_uring, which could open sockets past the filter, the calls that read another process's memory or take its
descriptors, and those that watch files, which Landlock lets pass. It holds for all threads and children, and cannot be
taken back. Python cannot install one itself, hence ctypes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_RET_KILL_PROCESS, _RET_ERRNO, _RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LD_WORD, _JUMP_EQUAL, _JUMP_GREATER_OR_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE = 0, 4  # of struct seccomp_data
_X32_BIT = 0x40000000  # x86_64's second calling convention has the same calls under other numbers

# Per machine: the audit architecture, and the numbers of seccomp and of the refused calls:
# socket, io_uring_setup, ptrace, process_vm_readv, process_vm_writev, pidfd_open, pidfd_getfd, fanotify_init,
# inotify_init1, inotify_init (which newer machines do not have).
_MACHINES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "x86_64": (0xC000003E, 317, (41, 425, 101, 310, 311, 434, 438, 300, 294, 253)),
    "aarch64": (0xC00000B7, 277, (198, 425, 117, 270, 271, 434, 438, 262, 26)),
}

# Of how many shapes of products torch's wrapper of oneDNN, and oneDNN itself, keep the compiled code: half a megabyte
# each, by their own defaults of 1024. Records of many lengths make new shapes in every step, few come again, and what
# is kept lies between the tensors in the C library's heap, which grows by the holes. The blocks of a text model share
# theirs; EfficientNet's 90 are compiled again in each step, a twentieth of its time (benchmarks/RESULTS.md).
_SHAPES_KEPT = 64


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def die_with_parent() -> None:
    """SIGKILL when the thread that started this process ends, whatever ended it. Linux only; elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def wake_gpus() -> None:
    """Has NVIDIA's driver make its devices where nobody has used a GPU since the machine started: a set-user-ID helper
    does that, which cannot any more once new privileges are given up."""
    helper = shutil.which("nvidia-modprobe")
    if helper and not Path("/dev/nvidia-uvm").exists():
        gpus = len([*Path("/proc/driver/nvidia/gpus").glob("*")])
        devices = (f"-c={number}" for number in range(max(1, gpus)))
        subprocess.run([helper, "-u", *devices], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)  # noqa: S603


def enter_sandbox() -> bool:
    """Installs the filter for all threads. False where this system cannot: the job runs, and says so."""
    machine = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or machine is None:
        return False
    architecture, seccomp, refused = machine
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 or libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        return False
    code = _filter(architecture, refused)
    program = _Program(len(code) // 8, code)
    result = libc.syscall(
        ctypes.c_long(seccomp),
        ctypes.c_uint(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_uint(_SECCOMP_FILTER_FLAG_TSYNC),
        ctypes.byref(program),
    )
    return bool(result == 0)


def _filter(architecture: int, refused: tuple[int, ...]) -> bytes:
    """Classic BPF over struct seccomp_data; jumps count instructions to skip."""
    first_number = int(architecture == _MACHINES["x86_64"][0])
    to_refusal = [len(refused) - position for position in range(len(refused))]
    instructions = [
        (_LD_WORD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _RET_KILL_PROCESS),
        (_LD_WORD, 0, 0, _OFFSET_NUMBER),
        *([(_JUMP_GREATER_OR_EQUAL, len(refused) + 1, 0, _X32_BIT)] if first_number else []),
        *((_JUMP_EQUAL, skip, 0, number) for skip, number in zip(to_refusal, refused, strict=True)),
        (_RETURN, 0, 0, _RET_ALLOW),
        (_RETURN, 0, 0, _RET_ERRNO | errno.EPERM),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


def offline_environment() -> None:
    """Set before transformers is imported: no hub, no telemetry, no progress bars in the log."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Memory is measured by torch's profiler, which announces itself on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Read when torch is loaded.
    for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(_SHAPES_KEPT))
    # cuBLAS is deterministic only with a fixed workspace; read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
