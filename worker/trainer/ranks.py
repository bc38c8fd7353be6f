"""Several ranks: processes of one host that train one job together, each on a device of its own where there are enough.

Rank 0 is the trainer that the supervisor knows. It reads the order, starts the others and hands each its order over a
socket pair that is the child's standard input; under torchrun the others are there already, and connect to a Unix
socket in the job folder. So the job's key is in no file, argument or environment. The same connection then carries a
rank's messages to rank 0, of which only a failure's code is passed on: rank 0 alone talks to the supervisor, writes
checkpoints and exports. A rank that is lost ends the job's attempt at once.

The process group (gloo on the CPU, NCCL between GPUs) listens on the loopback interface and is connected in full before
the sandbox closes. Other users of the host could listen in on loopback only as root.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist

from worker.trainer.control import Control
from worker.trainer.device import cuda_devices, device_type
from worker.trainer.dp.reduce import sum_over_ranks_
from worker.trainer.messages import Failed, Finished, Message, Stopped, decode
from worker.trainer.spec import TrainerSpec

#: How long a rank may keep the others waiting, in a step or while they meet.
TIMEOUT_SECONDS = 600.0
_MEETING_SECONDS = 120.0
#: How long rank 0 waits for the others' side of the story once a sum has failed.
_STORY_SECONDS = 10.0
_SOCKET_FILE = "ranks.sock"

#: `-m worker.trainer`, where the folder that both packages lie in cannot be listed any more (`landlock`).
_FURTHER_RANK = """
import importlib.util, sys
for name in ("app", "worker"):
    spec = importlib.util.spec_from_file_location(name, f"{sys.argv[1]}/{name}/__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
from worker.trainer.__main__ import main
sys.exit(main([]))
"""


@dataclass(frozen=True, slots=True)
class Order:
    """What a trainer is told, as one line of JSON. world_size: 0 before rank 0 has counted. store: the rendezvous."""

    folder: Path
    key: bytes = field(repr=False)
    rank: int = 0
    world_size: int = 0
    store: str = ""

    def to_line(self) -> bytes:
        """The inverse of `from_line`."""
        fields = {"folder": str(self.folder), "key": self.key.hex(), "rank": self.rank}
        return json.dumps({**fields, "world_size": self.world_size, "store": self.store}).encode() + b"\n"

    @classmethod
    def from_line(cls, line: str | bytes) -> Order:
        """Raises ValueError, KeyError or TypeError on anything else."""
        fields = json.loads(line)
        return cls(**{**fields, "folder": Path(fields["folder"]), "key": bytes.fromhex(fields["key"])})


class Ranks:
    """This process among the ranks of its job. control: to the supervisor on rank 0, to rank 0 on every other."""

    def __init__(self, order: Order, control: Control, channels: list[socket.socket]) -> None:
        """channels: rank 0's connections to the others."""
        self.order = order
        self.control = control
        self._channels = channels
        self._children: list[subprocess.Popen[bytes]] = []
        self._watchers = [
            threading.Thread(target=self._watch, args=(channel,), name="rank", daemon=True) for channel in channels
        ]

    @classmethod
    def meet(cls, order: Order, channel: socket.socket | None) -> Ranks:
        """Finds the others, starting them where nobody else does, and connects the process group.

        channel: to rank 0, on every other rank. Raises OSError or RuntimeError where they do not meet.
        """
        if order.rank > 0:
            assert channel is not None
            ranks = cls(order, Control(channel), [])
        elif order.world_size:  # under torchrun
            order = replace(order, store=f"ranks-{secrets.token_hex(8)}")
            ranks = cls(order, Control.connect(order.folder), _accept(order))
        else:
            order = replace(order, world_size=_wanted(order.folder), store=f"ranks-{secrets.token_hex(8)}")
            children = [_spawn(replace(order, rank=rank)) for rank in range(1, order.world_size)]
            ranks = cls(order, Control.connect(order.folder), [channel for _, channel in children])
            ranks._children = [child for child, _ in children]
        for watcher in ranks._watchers:
            watcher.start()
        if order.world_size > 1:
            _join_group(order)
        return ranks

    def close(self) -> None:
        """Rank 0 ends the conversations; another rank waits until it has."""
        if self.order.rank > 0:
            self.control.wait_for_end()
            self.control.close()
            return
        self.control.close()
        for channel in self._channels:
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_WR)
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_STORY_SECONDS)

    def hear_the_others(self) -> None:
        """After a failed sum: gives the rank that failed the time to say why, in which case this process ends here."""
        if self._watchers and not self.control.failed:
            time.sleep(_STORY_SECONDS)

    def _watch(self, channel: socket.socket) -> None:
        """One other rank's messages, to its end."""
        last: Message | None = None
        with contextlib.suppress(OSError, ValueError), channel.makefile("rb") as lines:
            for line in lines:
                last = decode(line)
        if isinstance(last, Failed):
            self.control.send(last)
        if not isinstance(last, Finished | Stopped):
            # The main thread may hang in a sum that never comes; children die with their parent.
            os._exit(1)


def receive(arguments: list[str]) -> tuple[Order, socket.socket | None] | None:
    """The order, however it comes, and the connection to rank 0 where it came over one. None: none will come.

    Raises ValueError, KeyError, TypeError on an order that is none, OSError where rank 0 under torchrun is not found.
    """
    if not arguments:
        line = sys.stdin.readline()
        if not line:
            return None  # a spare that was never needed
        order = Order.from_line(line)
        return order, socket.socket(fileno=os.dup(0)) if order.rank > 0 else None
    folder = Path(arguments[0]).resolve()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "0"))
    if world_size != int(os.environ.get("LOCAL_WORLD_SIZE", world_size)):
        raise ValueError("the ranks of a job are processes of one host")
    if rank > 0:
        return _connect(folder, rank)
    return Order(folder, bytes.fromhex(sys.stdin.readline()), 0, world_size), None


def order_waits() -> bool:
    """Whether `receive` would find an order, or the end of standard input, at once."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def _wanted(folder: Path) -> int:
    """As many as the job was frozen with, else one for each GPU, or one."""
    try:
        runtime = TrainerSpec.read(folder).runtime
    except (OSError, KeyError, TypeError, ValueError):
        return 1  # the attempt will fail on it, with its code
    if runtime.ranks:
        return runtime.ranks
    return max(1, cuda_devices()) if device_type(runtime) == "cuda" else 1


def _spawn(order: Order) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A trainer that has its order, and the connection to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    source = str(Path(__file__).resolve().parents[2])
    with theirs:
        child = subprocess.Popen([sys.executable, "-P", "-c", _FURTHER_RANK, source], stdin=theirs.fileno())  # noqa: S603
    ours.sendall(order.to_line())
    return child, ours


def _accept(order: Order) -> list[socket.socket]:
    """Under torchrun: the other ranks of this user, each told its order."""
    if order.world_size == 1:
        return []
    path = order.folder / _SOCKET_FILE
    path.unlink(missing_ok=True)
    channels: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(order.world_size)
        listener.settimeout(_MEETING_SECONDS)
        while len(channels) < order.world_size - 1:
            connection, _ = listener.accept()
            size = struct.calcsize("3i")
            _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
            (rank,) = connection.recv(1) or (0,)
            if user != os.getuid() or not 0 < rank < order.world_size or rank in channels:
                connection.close()
                continue
            connection.sendall(replace(order, rank=rank).to_line())
            channels[rank] = connection
    path.unlink()
    return list(channels.values())


def _connect(folder: Path, rank: int) -> tuple[Order, socket.socket]:
    deadline = time.monotonic() + _MEETING_SECONDS
    while True:
        channel = socket.socket(socket.AF_UNIX)
        try:
            channel.connect(str(folder / _SOCKET_FILE))
            channel.sendall(bytes([rank]))
            line = b""
            while not line.endswith(b"\n"):
                line += channel.recv(1) or b"\n"
            if line.strip():
                return Order.from_line(line), channel
        except OSError:
            if time.monotonic() > deadline:
                raise
        channel.close()
        time.sleep(0.1)


def _join_group(order: Order) -> None:
    loopback = "lo" if sys.platform == "linux" else "lo0"
    # No other interface, and every connection now: there are no new sockets in the sandbox.
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[name] = loopback
    os.environ.update(NCCL_IB_DISABLE="1", NCCL_RUNTIME_CONNECT="0")
    runtime = TrainerSpec.read(order.folder).runtime
    on_cuda = device_type(runtime) == "cuda"
    own_device = on_cuda and order.world_size <= cuda_devices()
    device = torch.device("cuda", order.rank % cuda_devices()) if on_cuda else torch.device("cpu")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own_device else "gloo",
        store=dist.FileStore(str(order.folder / order.store), order.world_size),  # type: ignore[attr-defined]
        rank=order.rank,
        world_size=order.world_size,
        timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS),
        device_id=device if own_device else None,
    )
    sum_over_ranks_([torch.zeros(1), torch.zeros(1, device=device)])
