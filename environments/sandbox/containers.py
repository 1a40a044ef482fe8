"""One container of the Docker backend: what it may do, the socket to its runner, and whose it is.

Nothing here imports `docker`: a container is driven through the engine's client that it is given.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environments.sandbox import base
from environments.sandbox.base import Limits
from environments.sandbox.pump import pump

LABEL, OWNER, INSTANCE = "polyrl.sandbox", "polyrl.owner", "polyrl.instance"
ENVIRONMENT = {"POLYRL_SANDBOX": "1", "PATH": "/nowhere", "HOME": "/tmp", "LANG": "C.UTF-8"}
_ABANDONED_S = 3600.0


def hardening(limits: Limits) -> dict[str, Any]:
    """The host config of every container: every privilege and resource that a program has is listed here.

    No `init`: the runner is process 1, which nothing inside can kill and which reaps what it adopts.
    """
    memory = f"{limits.memory_mb}m"
    return {
        "network_mode": "none",
        "read_only": True,
        "tmpfs": {"/tmp": f"rw,noexec,nosuid,nodev,size={limits.tmp_mb}m,nr_inodes=4k,mode=1777"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],  # the engine's default seccomp profile stays on; the runner adds ours
        "pids_limit": limits.processes + 8,
        "mem_limit": memory,
        "memswap_limit": memory,  # the sum with swap: no swap
        "oom_score_adj": 500,
        "nano_cpus": 1_000_000_000,
        "ulimits": [
            {"Name": "nofile", "Soft": limits.open_files, "Hard": limits.open_files},
            {"Name": "fsize", "Soft": limits.file_mb << 20, "Hard": limits.file_mb << 20},
            {"Name": "core", "Soft": 0, "Hard": 0},
        ],
        "ipc_mode": "none",
        "log_config": {"Type": "none"},
    }


def shape(limits: Limits) -> tuple[int, ...]:
    """What of the limits is fixed when a container is created."""
    return (limits.memory_mb, limits.processes, limits.open_files, limits.file_mb, limits.tmp_mb)


class Container:
    """One container and the socket to its runner; a Channel for `pump`."""

    def __init__(self, api: Callable[[], Any], container_id: str) -> None:
        self.open = True
        self.id = container_id
        self._api = api
        self._stream: Any = None
        self._buffer = bytearray()

    def start(self) -> None:
        """Attach, start, and wait until the runner is ready for a job."""
        self._stream = self._api().attach_socket(self.id, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
        self._socket.setblocking(False)
        self._api().start(self.id)
        kind, transcript = pump(self, b"", Limits(wall_s=60), until_ready=True)
        if not transcript.ready:
            raise RuntimeError(f"a container did not get ready ({kind}): {base.tail(transcript.stderr)[-300:]}")

    @property
    def alive(self) -> bool:
        """Whether the runner still waits: it says nothing, and the socket is open."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        return not poll.poll(0)

    @property
    def _socket(self) -> socket.socket:
        found: socket.socket = getattr(self._stream, "_sock", self._stream)
        return found

    def filenos(self) -> tuple[list[int], list[int]]:
        return [self._socket.fileno()], [self._socket.fileno()]

    def read(self, fd: int) -> list[tuple[str, bytes]]:
        """Frames of the engine's stream: one byte of stream number, three of nothing, four of length, then the data."""
        try:
            data = self._socket.recv(65_536)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        self.open = bool(data)
        self._buffer += data
        pieces = []
        while len(self._buffer) >= 8:
            stream, length = struct.unpack(">BxxxL", self._buffer[:8])
            if len(self._buffer) < 8 + length:
                break
            pieces.append(("out" if stream == 1 else "err", bytes(self._buffer[8 : 8 + length])))
            del self._buffer[: 8 + length]
        return pieces

    def write(self, data: bytes) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def state(self) -> dict[str, Any]:
        """What the engine knows about it. Raises what the engine's client raises."""
        found: dict[str, Any] = self._api().inspect_container(self.id)["State"]
        return found

    def kill(self) -> None:
        """End everything inside at once. Kills the container, not only our connection to it.

        Hang up first: the engine waits for a reader of the streams before it answers anything else about the container, and a
        program that floods them held it for a minute.
        """
        self._hang_up()
        with contextlib.suppress(Exception):  # it may have ended by itself
            self._api().kill(self.id)

    def remove(self) -> bool:
        """Whether it is gone. Where the engine does not answer, it is not."""
        self._hang_up()
        try:
            self._api().remove_container(self.id, force=True, v=True)
        except Exception as error:  # noqa: BLE001 - the client raises many kinds; two answers mean that it is gone or going
            return getattr(getattr(error, "response", None), "status_code", 0) in (404, 409)
        return True

    def _hang_up(self) -> None:
        if self._stream is None:
            return
        held, stream, self._stream = self._socket, self._stream, None
        with contextlib.suppress(OSError):
            held.shutdown(socket.SHUT_RDWR)  # closing alone leaves it open for as long as the HTTP response holds it
        with contextlib.suppress(OSError):
            stream.close()
        held.close()


def owner() -> str:
    """This process, told apart from any that had or will have its id: boot, process namespace, id, start time."""
    return f"{_machine()}|{os.getpid()}|{_start_time(os.getpid())}"


def abandoned(owner: str, created: float) -> bool:
    """Whether a container's process is gone. Of another machine or boot we cannot know, so its containers get an hour."""
    machine, _, rest = owner.partition("|")
    pid, _, started = rest.partition("|")
    if machine == _machine() and pid.isdigit():
        return _start_time(int(pid)) != started
    return time.time() - created > _ABANDONED_S


def _machine() -> str:
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{os.readlink('/proc/self/ns/pid')}"


def _start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
