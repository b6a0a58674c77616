"""A process that calls a user's function of text for `jaxrm.stages.rewards.function_processes`. It starts no JAX."""

import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from jaxrm.errors import UserError
from jaxrm.stages.rewards.function_call import FunctionFault, RewardFunction, call, open_function

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


def main(connection_fd: int, parent: int) -> None:
    """Open a function, and call it with the samples that arrive, until the other end closes.

    Args:
      connection_fd: of a socket to the process that started this one. It sends the name of the function and whether
        it returns spans, and then samples, a list at a time. Back go a `FunctionFault`, or None once the function is
        open, and lists of results.
      parent: id of that process.
    """
    _leave_stops_to_parent()
    _die_with(parent)
    os.set_inheritable(connection_fd, False)  # not for programs that the user's function starts
    connection = Connection(connection_fd)
    try:
        name, is_spans = connection.recv()
        function = _open(name)
        connection.send(function if isinstance(function, FunctionFault) else None)
        while not isinstance(function, FunctionFault):
            connection.send(_result(function, connection.recv(), is_spans=is_spans))
    except (EOFError, ConnectionError):
        return


def _open(name: str) -> RewardFunction | FunctionFault:
    try:
        return open_function(name)
    except UserError as error:
        return FunctionFault(f"cannot be opened in a process of its own: {error}")


def _result(function: RewardFunction, samples: Any, *, is_spans: bool) -> list[Any] | FunctionFault:
    try:
        return call(function, samples, is_spans=is_spans, finds_failure=False)  # the parent's limit is for one call
    except FunctionFault as fault:
        return fault


def _leave_stops_to_parent() -> None:
    """A run that is asked to stop finishes its step first, for which it needs its workers."""

    def ignore(number: int, frame: FrameType | None) -> None:
        del number, frame

    # A handler, and not SIG_IGN, which programs that the user's function starts would inherit.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, ignore)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _die_with(parent: int) -> None:
    """End when the parent does, in the middle of a call too. Elsewhere than on Linux, at the end of the call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(0)
