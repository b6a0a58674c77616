"""Stopping a run from outside without losing a step.

A machine that is about to be taken away sends SIGTERM; a person presses Ctrl-C (SIGINT). Both ask the loop to save
after the step it is in and to leave with ``EXIT_PREEMPTED``; the same command again continues. A second Ctrl-C
stops at once.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_PREEMPTED = 75
"""Exit status of a run that was asked to stop, and saved: ``EX_TEMPFAIL``, run the same command again."""


class StopRequest:
    """Whether somebody asked this process to stop, and with which signal.

    Attributes:
      requested: becomes True when the first signal arrives, and stays so.
      signal_name: "SIGTERM", "SIGINT", or None.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal_name: str | None = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.signal_name = signal.Signals(number).name
        # os.write, since print may be what the signal interrupted
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        os.write(2, f"\njaxrm: {self.signal_name}: saving after this step{again}\n".encode())


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM and the first SIGINT into a request that the loop looks at between steps.

        with catch_signals() as stop:
            for step in steps:
                ...
                if stop.requested:
                    save(); return EXIT_PREEMPTED

    A second SIGINT raises KeyboardInterrupt. The handlers that were there before come back at the end. Outside the
    main thread, where Python allows no handlers, nothing is caught. Enter it after ``jax.distributed.initialize``,
    which takes SIGTERM for itself.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, stop._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


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
