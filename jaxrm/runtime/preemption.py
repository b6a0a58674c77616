"""Stopping a run from outside without losing a step.

A machine that is about to be taken away sends SIGTERM; a person presses Ctrl-C (SIGINT). A loop that has something to
save (`catch_signals`) does so after the step that it is in. Everywhere else, from the first import on, the process ends
at once (`leave_on_signals`): what is on disk is whole at every moment. Both end with ``EXIT_PREEMPTED``, and the same
command continues. A second Ctrl-C stops at once, with ``EXIT_INTERRUPTED``.
"""

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import NoReturn, TypeVar

EXIT_PREEMPTED = 75
"""Exit status of a run that was asked to stop, and lost nothing: ``EX_TEMPFAIL``, run the same command again."""
EXIT_INTERRUPTED = 130

Item = TypeVar("Item")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_stderr = 2
_PATIENCE = 5.0  # seconds in which the main thread ends by itself; it may be in a long compilation


class PreemptedError(BaseException):
    """A signal came while nothing was to be saved. No `Exception`, so that only `run_preemptible` catches it."""


class StoppedError(Exception):
    """A loop's body was asked to stop, and leaves what it has begun."""


class StopRequest:
    """Whether somebody asked this process to stop, and with which signal.

    Attributes:
      requested: becomes True when the first signal arrives, and stays so.
      signal_name: "SIGTERM", "SIGINT", or None.
      has_progress: whether the loop has something that is not saved. While it has not, a command stops at once.
    """

    def __init__(self, *, has_progress: bool = True) -> None:
        self.requested = False
        self.signal_name: str | None = None
        self.has_progress = has_progress

    def check(self) -> None:
        """Leave what the loop is in the middle of; all processes call it equally often, since they `agree`.

        Raises:
          StoppedError: where it was asked to stop.
        """
        if agree(self.requested):
            raise StoppedError

    def checked(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, with a `check` before each."""
        for item in items:
            self.check()
            yield item

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if _command.may_leave(self):
            _command.on_signal(number, frame)
            return
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        if self.requested:
            return
        self.requested = True
        self.signal_name = signal.Signals(number).name
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        _say(f"{self.signal_name}: saving after this step{again}")


@contextmanager
def catch_signals(*, has_progress: bool = True) -> Iterator[StopRequest]:
    """Turn SIGTERM and the first SIGINT into a request that the loop looks at between steps.

        with catch_signals() as stop:
            for step in steps:
                ...
                if stop.requested:
                    save(); return EXIT_PREEMPTED

    A second SIGINT raises KeyboardInterrupt. The handlers that were there before come back at the end. Outside the
    main thread, where Python allows no handlers, nothing is caught. Enter it after ``jax.distributed.initialize``,
    which takes SIGTERM for itself.

    Args:
      has_progress: see `StopRequest`; a loop that says False says True once it has done a step.
    """
    stop = StopRequest(has_progress=has_progress)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, stop._on_signal) for number in _SIGNALS}
    before, _command.loop = _command.loop, stop
    try:
        yield stop
    finally:
        _command.loop = before
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def stop_requested() -> bool:
    """Whether the loop of this process was asked to stop, for what takes long within a step.

    Never where a job has several processes, since they must stop at the same place.
    """
    import jax

    loop = _command.loop
    return loop is not None and loop.requested and jax.process_count() == 1


def agree(flag: bool) -> bool:
    """Return whether ``flag`` is True in any process, the same answer in all; ``flag`` itself where there is one.

    All processes call it at the same step. It waits for the devices, so ask it every few steps, not in each: machines
    are usually given about 30 seconds after SIGTERM.
    """
    import jax

    if jax.process_count() == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def leave_on_signals(*, is_alone: bool = True) -> None:
    """From now on SIGTERM and Ctrl-C end this process with ``EXIT_PREEMPTED`` in one line, save where a loop catches.

    A command calls it before its imports, and again after ``jax.distributed.initialize``.

    Args:
      is_alone: whether this is the only process of its job; where it is not, loops stop together.
    """
    _command.listen(is_alone)


def run_preemptible(work: Callable[[], int], describe: Callable[[], str]) -> int:
    """Do a command's work, which a signal may end at any moment once `leave_on_signals` was called.

    Args:
      work: returns an exit status. It is unwound like after an exception, within 5 seconds.
      describe: what a stop means for the user, in a few words.

    Returns:
      What ``work`` returns, or ``EXIT_PREEMPTED``.
    """
    return _command.run(work, describe)


def say_interrupted() -> None:
    """From now on Ctrl-C ends this process with ``EXIT_INTERRUPTED`` in one line, also in the middle of its imports.

    There it does so at once: an exception in a compiled module that is being imported can abort the process.
    """

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            _say("interrupted")
            _exit(EXIT_INTERRUPTED)
        raise KeyboardInterrupt

    def say(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            _say("interrupted")
            _exit(EXIT_INTERRUPTED)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = say
    signal.signal(signal.SIGINT, on_interrupt)
    _raise_again(KeyboardInterrupt, signal.SIGINT)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


class _Command:
    """What signals do to a process that is a command of jaxrm, wherever no loop catches them."""

    def __init__(self) -> None:
        self.loop: StopRequest | None = None
        self._is_listening, self._is_alone = False, True
        self._signal_name = ""  # of a signal that no loop caught
        self._is_unwinding = False
        self._unwinds = False  # whether `run` catches what the handler raises
        self._status: int | None = None  # of work that is done
        self._describe: Callable[[], str] = lambda: "nothing was written; the same command starts anew"
        self._reader = -1

    def listen(self, is_alone: bool) -> None:
        """Take the signals, and start the thread that sees them where the main thread does not."""
        if self._reader < 0:
            # The main thread handles a signal between two bytecodes; a long compilation is a single one. This pipe is
            # written at once.
            self._reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True).start()
            atexit.register(_ignore_signals)  # before any library's, so that it runs behind them all
            _raise_again(PreemptedError, signal.SIGTERM)
        for number in _SIGNALS:
            signal.signal(number, self.on_signal)
        self._is_listening, self._is_alone = True, is_alone

    def may_leave(self, loop: StopRequest) -> bool:
        """Whether a loop is left at once, since it would save nothing and no other process waits for it."""
        return self._is_listening and self._is_alone and not loop.has_progress

    def run(self, work: Callable[[], int], describe: Callable[[], str]) -> int:
        """See `run_preemptible`."""
        self._describe, self._unwinds = describe, self._is_listening
        try:
            self._status = work()
        except BaseException:
            self._unwinds = False
            if not self._is_unwinding:
                raise
            # Also where a library made another error of it.
            self._report(self._signal_name)
            self._status = EXIT_PREEMPTED
        return self._status

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if self._status is not None:  # done, and on the way out
            _exit(self._status)
        if self._signal_name:
            if number == signal.SIGTERM and self._is_unwinding and self._unwinds:
                raise PreemptedError  # what the first one raised was dropped
            if number == signal.SIGINT:
                _say("interrupted")
                _exit(EXIT_INTERRUPTED)
            return
        self._signal_name = signal.Signals(number).name
        if self._unwinds:
            self._is_unwinding = True
            _silence_others()
            raise PreemptedError
        self._report(self._signal_name)
        _exit(EXIT_PREEMPTED)

    def _report(self, signal_name: str) -> None:
        _say(f"{signal_name}: stopped; {self._describe()}")

    def _watch(self) -> None:
        """End the process where a signal came and the main thread does not; in a thread of its own."""
        first, deadline, interrupted = 0, 0.0, False
        while True:
            ready, _, _ = select.select([self._reader], [], [], 0.2 if first else None)
            number = os.read(self._reader, 1)[0] if ready else 0
            loop, now = self.loop, time.monotonic()
            if number in _SIGNALS and not first:
                first, deadline = number, now + _PATIENCE
            elif number == signal.SIGINT and not interrupted:
                interrupted, deadline = True, now + 1.0
            elif first and not interrupted and loop is not None and not self.may_leave(loop):
                deadline = now + _PATIENCE  # it saves first, however long that takes
            if first and now > deadline:
                if interrupted:
                    _say("interrupted")
                    os._exit(EXIT_INTERRUPTED)
                if self._status is None:
                    self._report(signal.Signals(first).name)
                os._exit(EXIT_PREEMPTED if self._status is None else self._status)


def _ignore_signals() -> None:
    """Let the end of a process have its status: Python takes handlers away before the process is gone."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _raise_again(kind: type[BaseException], number: int) -> None:
    """Send a signal again where Python drops what its handler raised, as in a callback of the garbage collector."""
    main = threading.main_thread().ident
    assert main is not None

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if isinstance(dropped.exc_value, kind):
            threading.Timer(0.02, signal.pthread_kill, (main, number)).start()
        else:
            sys.__unraisablehook__(dropped)

    sys.unraisablehook = hook


def _say(text: str) -> None:
    # os.write, since print may be what the signal interrupted
    os.write(_stderr, f"\njaxrm: {text}\n".encode())


def _silence_others() -> None:
    """From now on only `_say` writes to stderr: threads of libraries print tracebacks while they are torn down."""
    global _stderr  # a file descriptor belongs to the process
    try:
        _stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    except OSError:  # no descriptors are left, and what is printed is no more than noise
        _stderr = 2


def _exit(status: int) -> NoReturn:
    with suppress(Exception):  # it may be in the middle of a flush
        sys.stdout.flush()
    os._exit(status)


_command = _Command()
