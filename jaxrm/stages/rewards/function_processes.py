"""Worker processes for a user's function of text: they share its samples, and can be stopped when it hangs."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from jaxrm.inference.text_scorer import TextSample
from jaxrm.stages.rewards.function_call import FunctionFault

_START_SECONDS = 120  # at least, for Python and the module of the function
_POLL_SECONDS = 1.0  # between two looks at processes whose connection says nothing
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from jaxrm.stages.rewards.function_worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


@dataclass(frozen=True)
class _Share:
    """Samples of one call.

    Attributes:
      indices: of the samples.
      is_retry: whether it is one sample of a share whose call raised, hung or ended the process.
    """

    indices: Sequence[int]
    is_retry: bool = False


class FunctionProcesses:
    """A function in processes of its own. They are started at the first call, and end with this object.

    A call gives each process one part of the samples. Where that takes too long, or the process dies, it is replaced.
    Then, or where the function raises, the samples are tried once more one at a time. So a failure that passes costs
    time alone, and one that stays is blamed on its sample.

    Args:
      name: of the function, as `jaxrm.stages.rewards.function_call.open_function` takes it.
      count: of processes.
      timeout: seconds that a call in one of them may take; None for any.
      is_spans: whether the function returns spans.
    """

    def __init__(self, name: str, count: int, timeout: float | None, *, is_spans: bool) -> None:
        self._name, self._count, self._timeout, self._is_spans = name, count, timeout, is_spans
        self._workers: list[_Worker] = []
        weakref.finalize(self, _stop, self._workers)  # when Python ends, too

    def __call__(self, samples: Sequence[TextSample]) -> list[Any]:
        """What the function returns for each sample, as `jaxrm.stages.rewards.function_call.call`.

        Raises:
          FunctionFault: it raises, returns anything else, or takes too long or ends its process twice.
        """
        results: list[Any] = [None] * len(samples)
        todo = deque(_in_shares(len(samples), self._count))
        busy: dict[_Worker, _Share] = {}
        try:
            while todo or busy:
                self._hand_out(samples, todo, busy)
                for worker, returned in self._next(busy):
                    share = busy.pop(worker)
                    if isinstance(returned, FunctionFault) and returned.is_unplaced and not share.is_retry:
                        todo.extend(_one_at_a_time(share))
                    elif isinstance(returned, FunctionFault):
                        raise FunctionFault(returned.problem, _index_in_batch(share, returned.index))
                    elif isinstance(returned, list):
                        for i, result in zip(share.indices, returned, strict=True):
                            results[i] = result
                    else:
                        todo.extend(self._replace(worker, share, returned))
        except BaseException:
            self.close()  # none of them goes on with what nobody waits for
            raise
        return results

    def close(self) -> None:
        """End the processes; a further call starts new ones."""
        _stop(self._workers)

    def _hand_out(self, samples: Sequence[TextSample], todo: deque[_Share], busy: dict["_Worker", _Share]) -> None:
        """Give shares to free workers, and start those that there are not yet."""
        missing = min(self._count, len(busy) + len(todo)) - len(self._workers)
        new = [_Worker(self._name, self._is_spans) for _ in range(missing)]
        self._workers += new
        for worker in new:
            worker.wait_until_open(max(_START_SECONDS, self._timeout or 0))
        for worker in self._workers:
            if todo and worker not in busy:
                busy[worker] = todo.popleft()
                worker.send([samples[i] for i in busy[worker].indices], self._timeout)

    def _next(self, busy: dict["_Worker", _Share]) -> list[tuple["_Worker", Any]]:
        """What the next workers returned, if any: results, a fault, or as text that there is nothing to come."""
        left = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        wait([worker.connection for worker in busy], min(left, _POLL_SECONDS))
        ready = [worker for worker in busy if worker.is_ready]
        now = time.monotonic()
        late = [worker for worker in busy if worker not in ready and worker.deadline <= now]
        returned = [(worker, worker.receive()) for worker in ready]
        return returned + [(worker, f"took more than {self._timeout:g} s on") for worker in late]

    def _replace(self, worker: "_Worker", share: _Share, problem: str) -> list[_Share]:
        """Stop a worker whose call came to nothing, and split its share.

        Raises:
          FunctionFault: the call was the second one with its sample.
        """
        self._workers.remove(worker)
        worker.stop()
        if share.is_retry:
            raise FunctionFault(problem, share.indices[0])
        return _one_at_a_time(share)


class _Worker:
    """A process, `jaxrm.stages.rewards.function_worker`, and the connection to it."""

    def __init__(self, name: str, is_spans: bool) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-c", _COMMAND, json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the run, which needs its workers to end well
                env=os.environ | {"JAX_PLATFORMS": "cpu"},  # the accelerator is the run's, whatever is imported
            )
        self.connection = Connection(ours.detach())
        self.deadline = float("inf")
        self._send((name, is_spans))

    def wait_until_open(self, seconds: float) -> None:
        """Wait until the function is there to be called, for so long at most.

        Raises:
          FunctionFault: it cannot be opened.
        """
        fault: Any = "cannot be opened in a process of its own: its module takes too long to import"
        if self.connection.poll(seconds):
            fault = self.receive()
        if fault is not None:
            raise fault if isinstance(fault, FunctionFault) else FunctionFault(fault.removesuffix(" on"))

    def send(self, samples: list[TextSample], timeout: float | None) -> None:
        """Start a call; `receive` gives what it returns."""
        self._send(samples)
        self.deadline = float("inf") if timeout is None else time.monotonic() + timeout

    @property
    def is_ready(self) -> bool:
        """Whether something has arrived, or the process has ended."""
        return self._process.poll() is not None or self.connection.poll()

    def receive(self) -> Any:
        """What arrived; as text, that the process has ended."""
        try:
            # A process that the user's function started may keep the connection of one that has ended.
            if self._process.poll() is None or self.connection.poll():
                return self.connection.recv()
        except (EOFError, OSError):
            pass
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        return f"ended its process, with exit status {self._process.returncode}, on"

    def stop(self) -> None:
        """End the process, and what the user's function has started in it."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()

    def _send(self, content: Any) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it has ended, as `receive` finds
            self.connection.send(content)


def _in_shares(length: int, count: int) -> list[_Share]:
    """Contiguous parts of nearly the same size."""
    bounds = [length * i // count for i in range(count + 1)]
    return [_Share(range(start, stop)) for start, stop in itertools.pairwise(bounds) if stop > start]


def _one_at_a_time(share: _Share) -> list[_Share]:
    return [_Share([i], is_retry=True) for i in share.indices]


def _index_in_batch(share: _Share, index: int | None) -> int | None:
    return None if index is None else share.indices[index]


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()
    workers.clear()
