"""One launch at a time works in a folder: a lock that says who, and that a dead process does not hold for ever.

The lock is the file ``.lock`` in the folder. It is made by linking or creating, which is atomic on network folders too,
and holds its owner as JSON. A thread of the owner touches it every `HEARTBEAT_SECONDS`. It is taken over

- at once, where its owner was a process of this host and container that has ended, by SIGKILL for instance;
- else when nobody has touched it for `SILENCE_SECONDS`, while this process watched. Clocks are not compared.

Only commands that write into a folder take its lock; those that look do not.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxrm import atomic
from jaxrm.errors import UserError, flag, option
from jaxrm.owner import Owner, this_process

LOCK = ".lock"
HEARTBEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0
EXIT_LOCK_LOST = 77
_LONG_AGO = 3600.0  # seconds by which no two clocks differ


@dataclass(frozen=True)
class _Lock:
    """What a lock file holds: its owner, when it was taken, and a text that no other lock has."""

    owner: Owner
    since: str
    token: str


_mine: dict[Path, _Lock] = {}  # locks of this process, by folder
_changing = threading.Lock()
_heart: list[threading.Thread] = []


def is_no_content(name: str) -> bool:
    """Whether a file of this name is a lock, or what a killed process left: a folder with only these is empty."""
    return name.startswith(LOCK) or atomic.is_unfinished(name)


def take(folder: Path, run_dir: str) -> None:
    """Take the lock of a folder, which this process may hold already.

    Args:
      folder: that exists.
      run_dir: how ``config.run_dir`` spells it.

    Raises:
      UserError: a process that lives holds it; the message says which.
    """
    folder = folder.resolve()
    if folder in _mine:
        return
    path = folder / LOCK
    wanted = _Lock(this_process(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), _token())
    while not _create(path, wanted):
        present = _read(path)
        if path.is_dir():
            raise UserError(f"{path} is a folder, but the lock of {run_dir} has this name; remove it")
        if _is_stale(path, present, run_dir):
            if _replace(path, present, wanted):
                _say(f"{run_dir} was in use by {_name(present)}, which has ended; taking it over")
                break
        elif path.exists():  # else it was given back meanwhile
            raise _in_use(run_dir, _read(path) or present)
    with _changing:
        _mine[folder] = wanted
        if not _heart or not _heart[0].is_alive():
            _heart[:] = [threading.Thread(target=_beat, name="jaxrm heartbeat", daemon=True)]
            _heart[0].start()


def check_free(folder: Path, run_dir: str) -> None:
    """Refuse a folder that a process that lives is working in; writes nothing and waits for nobody.

    Raises:
      UserError: as `take`. A lock of another host, whose owner may have ended, is left for `take` to judge.
    """
    present = _read(folder / LOCK)
    if present is not None and present.owner.is_here() and folder.resolve() not in _mine and present.owner.is_alive():
        raise _in_use(run_dir, present)


def wait_until_free(folder: Path, seconds: float) -> None:
    """Return when no other process of this host is working in a folder, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            return check_free(folder, str(folder))
        except UserError:
            time.sleep(0.5)
    return None


def give_back(folder: Path) -> None:
    """Remove the lock of a folder if this process holds it."""
    folder = folder.resolve()
    with _changing:
        lock = _mine.pop(folder, None)
    if lock is not None and _read(folder / LOCK) == lock:
        with contextlib.suppress(OSError):  # a disk that is gone ends the run elsewhere
            (folder / LOCK).unlink()


@contextlib.contextmanager
def given_back() -> Iterator[None]:
    """Give back at the end what locks were taken within."""
    before = set(_mine)
    try:
        yield
    finally:
        for folder in set(_mine) - before:
            give_back(folder)


def _token() -> str:
    return secrets.token_hex(8)


def _in_use(run_dir: str, lock: _Lock | None) -> UserError:
    stop = f"stop it (kill {lock.owner.pid} on {lock.owner.host})" if lock is not None else "stop it"
    return UserError(
        f"{option('run_dir')} is {run_dir!r}, which is in use by {_name(lock)}; wait for it, {stop}, or use another "
        f"folder, e.g. {flag('run_dir')}={run_dir.rstrip('/')}-2"
    )


def _name(lock: _Lock | None) -> str:
    return "another process" if lock is None else f"{lock.owner} since {lock.since}"


def _create(path: Path, lock: _Lock) -> bool:
    """Make the lock's file, whole, unless there is one."""
    text = json.dumps({"owner": dataclasses.asdict(lock.owner), "since": lock.since, "token": lock.token}) + "\n"
    draft = path.with_name(f"{LOCK}.{lock.token}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links; a lock that is being written reads as that of nobody known
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                return False
        return True
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _replace(path: Path, stale: _Lock | None, lock: _Lock) -> bool:
    """Put ``lock`` in the place of a stale one, unless another process does."""
    # Of all that saw the same stale lock, the one that makes this file may replace it.
    turn = path.with_name(f"{LOCK}.{'unreadable' if stale is None else stale.token}.turn")
    try:
        if time.time() - turn.stat().st_mtime > SILENCE_SECONDS:  # its maker was killed
            turn.unlink(missing_ok=True)
    except OSError:
        pass
    try:
        turn.open("x").close()
    except FileExistsError:
        time.sleep(0.2)
        return False
    try:
        if _read(path) != stale:
            return False
        path.unlink(missing_ok=True)
        return _create(path, lock)
    finally:
        turn.unlink(missing_ok=True)


def _read(path: Path) -> _Lock | None:
    """The lock that a file holds; None where there is no file, or none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        owner = Owner(**record["owner"])
        assert all(isinstance(number, int) for number in (owner.pid, owner.started)) and owner.pid > 0
        return _Lock(owner, str(record["since"]), str(record["token"]))
    except (OSError, ValueError, TypeError, KeyError, AssertionError):
        return None


def _touched(path: Path) -> float | None:
    try:
        with path.open("rb") as file:  # opened, since network folders remember what they knew of a file
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _is_stale(path: Path, lock: _Lock | None, run_dir: str) -> bool:
    """Whether a lock's owner has ended; for one of another host this may take `SILENCE_SECONDS`."""
    if lock is not None and lock.owner.is_here():
        return not lock.owner.is_alive()
    first, begin = _touched(path), time.monotonic()
    if first is None:
        return False  # given back, or changed just now: the next round tells
    if time.time() - first > _LONG_AGO:
        return True
    _say(f"{run_dir} is in use by {_name(lock)}; waiting up to {SILENCE_SECONDS:g} s for a sign of life")
    while time.monotonic() - begin < SILENCE_SECONDS:
        time.sleep(min(1.0, HEARTBEAT_SECONDS / 5))
        if _touched(path) != first or _read(path) != lock:
            return False
    return True


def _beat() -> None:
    """Touch the locks of this process for as long as it lives; end it where another launch took one over."""
    while True:
        time.sleep(HEARTBEAT_SECONDS)
        with _changing:
            locks = dict(_mine)
        for folder, lock in locks.items():
            present = _read(folder / LOCK)
            if present == lock:
                with contextlib.suppress(OSError):
                    os.utime(folder / LOCK)
            elif present is not None and _mine.get(folder) == lock:
                _say(
                    f"{folder} was taken over by {_name(present)}, since this process gave no sign of life for "
                    f"{SILENCE_SECONDS:g} s; this one stops, so that two do not write into one run"
                )
                os._exit(EXIT_LOCK_LOST)


def _say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"jaxrm: {message}", file=sys.stderr, flush=True)
