"""Which process something belongs to, and whether that process still lives."""

import functools
import getpass
import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Owner:
    """A process, as another one on any host can know it.

    Attributes:
      user: who started it.
      host: name of its machine.
      place: where its pid means something: a machine since it was started, and a container on it.
      pid: its number there.
      started: when it was started, in ticks of its machine; 0 where the system does not say. Numbers are given again.
    """

    user: str
    host: str
    place: str
    pid: int
    started: int

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}"

    def is_here(self) -> bool:
        """Whether this process can see that one, if it lives."""
        return self.place == _place()

    def is_alive(self) -> bool:
        """Whether it lives; asked only of one that `is_here`."""
        return is_alive(self.pid) and (not self.started or self.started == _started(self.pid))


@functools.cache
def _of_pid(pid: int) -> Owner:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a number without a name, as in some containers
        user = f"user {os.getuid()}"
    return Owner(user, socket.gethostname(), _place(), pid, _started(pid))


def this_process() -> Owner:
    """This process."""
    return _of_pid(os.getpid())  # by number, since a fork is another one


def is_alive(pid: int) -> bool:
    """Whether a process of this number lives here; one that has ended and waits for its parent does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return pid < 2**31
    return _status(pid)[:1] not in (["Z"], ["X"])


def place_name() -> str:
    """Eight characters that stand for the place of this process in the names of files."""
    return hashlib.sha256(_place().encode()).hexdigest()[:8]


@functools.cache
def _place() -> str:
    """Host, its start, and the container's numbering of processes. Hosts alone do not do: names are given twice."""
    parts = [socket.gethostname()]
    try:
        parts.append((_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str((_PROC / "self/ns/pid").readlink()))
    except OSError:  # not Linux
        pass
    return " ".join(parts)


def _status(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` behind the name; empty where there is none."""
    try:
        return (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _started(pid: int) -> int:
    fields = _status(pid)
    return int(fields[19]) if len(fields) > 19 else 0
