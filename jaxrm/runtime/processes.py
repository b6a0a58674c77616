"""Several processes that run one job together: how they find each other, agree, and end when one is lost."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from jaxrm.errors import UserError, option
from jaxrm.runtime.preemption import StoppedError

EXIT_PROCESS_LOST = 76
HEARTBEAT_SECONDS = 30  # after which a process that says nothing counts as lost
_MESSAGE_BYTES = 4096  # of an error that process 0 sends to the others
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Processes:
    """How the processes of a job find each other.

    Attributes:
      coordinator: ``host:port`` of the first process; None where the cluster says it (SLURM, GKE, Cloud TPU).
      count: of processes; None likewise.
      index: of this one, from 0; None likewise.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None


def find_processes(
    coordinator: str | None, count: int | None, index: int | None, environment: Mapping[str, str]
) -> Processes | None:
    """How this process was started: by flags, by JAX's own variables, or by a cluster that JAX knows.

    Flags come before ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, and these before what
    SLURM (a step of several tasks) and GKE (several worker hosts, or several slices) say. On TPU VMs the workers are
    known to the metadata server alone; ``launch/tpu_pod.sh`` asks it and sets JAX's variables.

    Returns:
      None for a job of one process.

    Raises:
      UserError: where some of the three values are given and others are not, or one cannot be.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    flags = ("--coordinator", "--num_processes", "--process_id")
    given = [
        environment.get(name) or None if value is None else str(value)
        for name, value in zip(names, (coordinator, count, index), strict=True)
    ]
    if any(value is not None for value in given):
        absent = [flag for flag, value in zip(flags, given, strict=True) if value is None]
        if absent:
            raise UserError(
                f"{' and '.join(absent)} missing; several processes need all of {', '.join(flags)}, "
                "e.g. --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=0"
            )
        address, number, which = (str(value) for value in given)
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"--coordinator is {address!r}; use host:port, e.g. --coordinator=10.0.0.1:8476")
        if not number.isdecimal() or int(number) < 1:
            raise UserError(f"--num_processes is {number!r}; use how many there are, e.g. --num_processes=2")
        if not which.isdecimal() or int(which) >= int(number):
            raise UserError(f"--process_id is {which!r}; use 0 to {int(number) - 1}, e.g. --process_id=0")
        return Processes(address, int(number), int(which)) if int(number) > 1 else None
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    hosts = [host for host in workers.split(",") if host]
    slices = environment.get("MEGASCALE_NUM_SLICES", "1")
    if (tasks.isdecimal() and int(tasks) > 1) or len(hosts) > 1 or (slices.isdecimal() and int(slices) > 1):
        return Processes()
    return None


def start(processes: Processes, *, timeout: int = 300) -> None:
    """Join the other processes; comes before anything else asks JAX for its devices.

    Args:
      processes: from ``find_processes``.
      timeout: seconds to wait for the others.

    Raises:
      UserError: where the first process cannot be reached, or the others do not come.
    """
    begin = time.monotonic()
    if processes.coordinator is not None and processes.index:
        _wait_for(processes.coordinator, timeout)
    left = max(1, round(timeout - (time.monotonic() - begin)))
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            initialization_timeout=left,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=60,
            # With all three given there is nothing to detect; SLURM's detection would leave a process one GPU.
            cluster_detection_method=None if processes.coordinator is None else "deactivate",
        )
    except (RuntimeError, ValueError) as error:  # JaxRuntimeError is a RuntimeError
        where = processes.coordinator or "the address of the cluster"
        raise UserError(
            f"the {processes.count or ''} processes did not come together at {where} within {timeout} s: "
            f"{' '.join(str(error).split())[:300]}; check that all were started with the same --coordinator and "
            "--num_processes and each with its own --process_id"
        ) from error


def check_agreement(config: Mapping[str, Any]) -> None:
    """Refuse to begin where the processes run different code or configs; every process calls this.

    Args:
      config: as ``jaxrm.config.dicts.to_dict`` gives it.

    Raises:
      UserError: on every process, saying which processes differ from the first, and in which sections.
    """
    versions = json.dumps([jax.__version__, sys.version_info[:2]]).encode()
    code = b"".join(path.read_bytes() for path in sorted(_ROOT.rglob("*.py")))
    if unlike := _differing([versions, code]):
        what = ["versions of Python or JAX", "code of jaxrm"]
        raise UserError(_disagreement(unlike, what) + "; install the same commit and requirements on every host")
    sections = sorted(config)
    if unlike := _differing([json.dumps(config[name], sort_keys=True, default=str).encode() for name in sections]):
        names = [f"{option(name)}" for name in sections]
        raise UserError(_disagreement(unlike, names) + "; start every process with the same --config and overrides")


def check_same_inputs(contents: Mapping[str, str]) -> None:
    """Refuse to begin where the processes have read different inputs; every process calls this once they are read.

    Args:
      contents: by name for people, a text or hash that changes with the input, in the same order everywhere.

    Raises:
      UserError: on every process, saying which processes differ from the first, and in what.
    """
    if jax.process_count() > 1 and (unlike := _differing([content.encode() for content in contents.values()])):
        raise UserError(
            _disagreement(unlike, list(contents)) + "; give every host the same files, or a folder that all of them see"
        )


def once_a_job(work: Callable[[], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """What ``work`` gives in process 0, in every process, or its error: so all of them stop at the same place.

    Every process calls this; process 0 alone works.

    Args:
      work: gives float32 numbers.
      shape: of them.

    Raises:
      UserError: with the message of process 0, whatever error it was but the next.
      StoppedError: process 0 was asked to stop.
    """
    if jax.process_count() == 1:
        return work()
    from jax.experimental import multihost_utils

    numbers, failure = np.zeros(shape, np.float32), None
    if jax.process_index() == 0:
        try:
            numbers = work()
        except Exception as error:  # whatever it is, the others must not wait
            failure = error
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    if failure is not None:
        text = str(failure) if isinstance(failure, UserError) else f"process 0 raised {type(failure).__name__}"
        encoded = np.frombuffer((text or "process 0 failed").encode(errors="replace")[:_MESSAGE_BYTES], np.uint8)
        message[: len(encoded)] = encoded
    is_stopped = np.bool_(isinstance(failure, StoppedError))
    numbers, message, is_stopped = multihost_utils.broadcast_one_to_all((numbers, message, is_stopped))
    if failure is not None:
        raise failure
    if is_stopped:
        raise StoppedError
    text = np.asarray(message).tobytes().rstrip(b"\0").decode(errors="replace")
    if text:
        raise UserError(text)
    return np.asarray(numbers)


def _differing(mine: list[bytes]) -> list[tuple[int, list[int]]]:
    """The processes that differ from the first, each with the indices of what differs."""
    from jax.experimental import multihost_utils

    own = np.frombuffer(b"".join(hashlib.sha256(part).digest()[:8] for part in mine), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(own)).reshape(jax.process_count(), len(mine), 8)
    unlike = (everyone != everyone[0]).any(axis=-1)
    return [(int(index), [int(part) for part in np.flatnonzero(unlike[index])]) for index in unlike.any(1).nonzero()[0]]


def _disagreement(unlike: list[tuple[int, list[int]]], names: list[str]) -> str:
    parts = [
        f"process {index} has another {' and '.join(names[i] for i in differing)}" for index, differing in unlike[:4]
    ]
    more = f" and {len(unlike) - 4} more differ" if len(unlike) > 4 else ""
    return f"the processes disagree: {', '.join(parts)}{more} than process 0"


def leave_if_lost(error: BaseException) -> None:
    """End this process in one line where ``error`` says that another one is gone; else return.

    The interpreter's own end would wait for the lost process, so this one leaves at once, with status 76.
    """
    text = str(error)
    signs = ("Gloo", "gloo", "Connection reset", "Connection closed", "heartbeat", "UNAVAILABLE", "ABORTED", "NCCL")
    if jax.process_count() == 1 or not any(sign in text for sign in signs):
        return
    _leave(" ".join(text.split())[:200])


def _leave(reason: str) -> NoReturn:
    print(
        f"jaxrm: process {jax.process_index()} of {jax.process_count()} stops, since another one is gone ({reason}); "
        "start all of them again with the same command: the run continues from its latest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    sys.stdout.flush()
    os._exit(EXIT_PROCESS_LOST)


def _wait_for(address: str, timeout: float) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=max(0.1, deadline - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() + 0.5 >= deadline:
                raise UserError(
                    f"--coordinator is {address}, which could not be reached in {timeout:g} s ({error}); check that "
                    "the process with --process_id=0 runs there, that the address is the one other hosts see, and that "
                    "no firewall closes the port"
                ) from error
        time.sleep(0.5)
