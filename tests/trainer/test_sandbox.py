"""The sandbox for real: in a child process, since it cannot be taken back."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from worker.trainer.sandbox import wake_gpus

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="seccomp as on Linux"
)


def _in_sandbox(body: str) -> object:
    """Runs `body` behind the sandbox in a fresh process; what it assigns to `result`."""
    code = textwrap.dedent("""
        import ctypes, errno, json, os, socket, subprocess, sys, threading
        from worker.trainer.sandbox import enter_sandbox
        def attempt(call):
            try:
                call()
            except OSError as error:
                return errno.errorcode[error.errno]
            return "allowed"
        before = socket.create_server(("127.0.0.1", 0))
        waiting, go, from_thread = threading.Event(), threading.Event(), []
        def late():
            waiting.set(); go.wait(); from_thread.append(attempt(lambda: socket.socket(socket.AF_INET)))
        thread = threading.Thread(target=late); thread.start(); waiting.wait()
        entered = enter_sandbox()
    """)
    code += textwrap.dedent(body) + "\ngo.set(); thread.join(); print(json.dumps([entered, result]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    entered, result = json.loads(done.stdout)
    assert entered is True
    return result


def test_a_connect_to_loopback_fails() -> None:
    assert _in_sandbox("result = attempt(lambda: socket.create_connection(before.getsockname()))") == "EPERM"


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"])
def test_no_socket_opens(family: str) -> None:
    assert _in_sandbox(f"result = attempt(lambda: socket.socket(socket.{family}))") == "EPERM"


def test_it_holds_for_threads_that_were_there_before_and_for_children() -> None:
    body = """
        go.set(); thread.join()
        child = "import socket\\ntry:\\n socket.socket()\\nexcept PermissionError:\\n print('EPERM')"
        output = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout.strip()
        result = [*from_thread, output]
    """
    assert _in_sandbox(body) == ["EPERM", "EPERM"]


def test_other_processes_cannot_read_it_and_it_cannot_read_them() -> None:
    body = """
        libc = ctypes.CDLL(None, use_errno=True)
        def io_uring():
            if libc.syscall(425, 4, None) < 0:
                raise OSError(ctypes.get_errno(), "")
        status = open("/proc/self/status").read()
        no_new_privileges = "NoNewPrivs:\\t1" in status and "Seccomp:\\t2" in status
        result = [attempt(io_uring), libc.prctl(3, 0, 0, 0, 0), no_new_privileges]
    """
    assert _in_sandbox(body) == ["EPERM", 0, True]


def test_it_takes_no_descriptor_of_its_parent() -> None:
    body = """
        libc = ctypes.CDLL(None, use_errno=True)
        def getfd():
            if libc.syscall(438, -1, 0, 0) < 0:
                raise OSError(ctypes.get_errno(), "")
        result = [attempt(lambda: os.pidfd_open(os.getppid())), attempt(getfd)]
    """
    assert _in_sandbox(body) == ["EPERM", "EPERM"]


def test_it_watches_no_files() -> None:
    """Landlock lets a folder be watched that it does not let be listed."""
    body = """
        libc = ctypes.CDLL(None, use_errno=True)
        def watch(call):
            if call() < 0:
                raise OSError(ctypes.get_errno(), "")
        calls = (lambda: libc.inotify_init(), lambda: libc.inotify_init1(0), lambda: libc.fanotify_init(0, 0))
        result = [attempt(lambda: watch(call)) for call in calls]
    """
    assert _in_sandbox(body) == ["EPERM"] * 3


@pytest.mark.skipif(Path("/dev/nvidia-uvm").exists(), reason="this machine's GPUs are awake")
def test_gpus_are_woken_while_a_helper_may_still_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "nvidia-modprobe"
    helper.write_text('#!/bin/sh\necho "$@" >> "$0.calls"\nexit 1\n')
    helper.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    wake_gpus()
    assert (tmp_path / "nvidia-modprobe.calls").read_text() == "-u -c=0\n"
    helper.unlink()
    wake_gpus()


def test_files_threads_and_a_socket_from_before_still_work() -> None:
    body = """
        import tempfile
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
        result = before.getsockname()[0]
    """
    assert _in_sandbox(body) == "127.0.0.1"
