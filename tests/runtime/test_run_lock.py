"""Who may work in a folder: one process at a time, and none that has ended."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxrm import owner
from jaxrm.errors import UserError
from jaxrm.runtime import run_lock

ROOT = Path(__file__).resolve().parents[2]
HOLD = "import sys, time; from pathlib import Path; from jaxrm.runtime import run_lock"
HOLD += "; run_lock.take(Path(sys.argv[1]), 'run'); print('taken', flush=True); time.sleep(float(sys.argv[2]))"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "SILENCE_SECONDS", 1.0)
    with run_lock.given_back():
        yield


def holder(folder, seconds=60.0):
    """A process that has the lock of ``folder``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "taken\n"
    return process


def end(process, number=signal.SIGKILL):
    process.send_signal(number)
    process.wait()
    process.stdout.close()


def write_lock(folder, **changes):
    """The lock of a process on another host."""
    record = {
        "owner": {"user": "ann", "host": "far", "place": "far boot 1", "pid": 7, "started": 1} | changes,
        "since": "2026-01-02T03:04:05+00:00",
        "token": "0" * 16,
    }
    (folder / run_lock.LOCK).write_text(json.dumps(record))


def test_a_second_process_is_refused_with_who_and_since_when(tmp_path):
    process = holder(tmp_path)
    try:
        for _ in range(2):
            with pytest.raises(UserError) as caught:
                run_lock.take(tmp_path, "runs/x")
        message = str(caught.value)
        assert message.startswith(f"config.run_dir is 'runs/x', which is in use by process {process.pid} of ")
        assert f" on {owner.this_process().host} since 20" in message
        assert f"wait for it, stop it (kill {process.pid} on " in message
        assert message.endswith("or use another folder, e.g. --config.run_dir=runs/x-2") and "\n" not in message
        with pytest.raises(UserError, match="in use"):
            run_lock.check_free(tmp_path, "runs/x")
        assert [path.name for path in tmp_path.iterdir()] == [run_lock.LOCK]
    finally:
        end(process)


def test_the_lock_of_a_killed_process_is_taken_at_once(tmp_path, capfd):
    process = holder(tmp_path)
    end(process)
    begin = time.monotonic()
    run_lock.check_free(tmp_path, "run")
    run_lock.take(tmp_path, "run")
    assert time.monotonic() - begin < 0.5
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"jaxrm: run was in use by process {process.pid} of ")
    assert line.endswith(", which has ended; taking it over")


def test_a_process_that_waits_for_its_parent_has_ended(tmp_path):
    process = holder(tmp_path)
    process.kill()
    while Path(f"/proc/{process.pid}").exists() and owner.is_alive(process.pid):
        time.sleep(0.01)
    run_lock.take(tmp_path, "run")
    end(process)


def test_a_number_that_was_given_again_is_another_process(tmp_path):
    me = owner.this_process()
    write_lock(tmp_path, place=me.place, host=me.host, pid=os.getppid(), started=1)
    run_lock.take(tmp_path, "run")


def test_a_silent_owner_on_another_host_is_waited_for(tmp_path, capfd):
    write_lock(tmp_path)
    begin = time.monotonic()
    run_lock.take(tmp_path, "run")
    assert time.monotonic() - begin >= run_lock.SILENCE_SECONDS
    first, second = capfd.readouterr().err.splitlines()
    who = "jaxrm: run {} in use by process 7 of ann on far since 2026-01-02T03:04:05+00:00"
    assert first == f"{who.format('is')}; waiting up to 1 s for a sign of life"
    assert second == f"{who.format('was')}, which has ended; taking it over"


def test_a_beating_owner_on_another_host_is_left_alone(tmp_path):
    write_lock(tmp_path)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.2):
            os.utime(tmp_path / run_lock.LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 7 of ann on far since 2026"):
            run_lock.take(tmp_path, "run")
    finally:
        stop.set()
        thread.join()


def test_a_lock_that_nobody_touched_for_an_hour_is_taken_at_once(tmp_path):
    write_lock(tmp_path)
    os.utime(tmp_path / run_lock.LOCK, (time.time() - 7200,) * 2)
    begin = time.monotonic()
    run_lock.take(tmp_path, "run")
    assert time.monotonic() - begin < 0.5


@pytest.mark.parametrize("text", ["", "{", "[]", '{"owner": {}}', '{"owner": 3}', "\x00\xff"])
def test_a_damaged_lock_is_that_of_nobody_known(tmp_path, text):
    (tmp_path / run_lock.LOCK).write_text(text)
    run_lock.take(tmp_path, "run")
    assert json.loads((tmp_path / run_lock.LOCK).read_text())["owner"]["pid"] == os.getpid()


def test_a_folder_in_the_place_of_the_lock_is_named(tmp_path):
    (tmp_path / run_lock.LOCK).mkdir()
    with pytest.raises(UserError, match=r"\.lock is a folder, but the lock of run has this name; remove it"):
        run_lock.take(tmp_path, "run")


def test_of_many_that_see_a_stale_lock_one_takes_it(tmp_path):
    process = holder(tmp_path)
    end(process)
    others = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), "2"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    ends = [other.communicate(timeout=600) for other in others]
    assert sorted(other.returncode for other in others) == [0, 1, 1, 1]
    assert sum(out == "taken\n" for out, _ in ends) == 1
    assert sum("which is in use by process" in err for _, err in ends) == 3


def test_file_systems_without_links_have_locks_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    run_lock.take(tmp_path, "run")
    lock = run_lock._read(tmp_path / run_lock.LOCK)
    assert lock is not None and lock.owner == owner.this_process()
    assert not run_lock._create(tmp_path / run_lock.LOCK, lock)
    assert [path.name for path in tmp_path.iterdir()] == [run_lock.LOCK]


def test_a_process_may_take_its_own_lock_again(tmp_path):
    with run_lock.given_back():
        run_lock.take(tmp_path, "run")
        with run_lock.given_back():
            run_lock.take(tmp_path, "run")
        assert (tmp_path / run_lock.LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_touched_while_its_owner_lives(tmp_path):
    run_lock.take(tmp_path, "run")
    os.utime(tmp_path / run_lock.LOCK, (0, 0))
    deadline = time.monotonic() + 15
    while (tmp_path / run_lock.LOCK).stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (tmp_path / run_lock.LOCK).stat().st_mtime > 0


def test_a_process_whose_lock_was_taken_over_stops(tmp_path):
    code = HOLD.replace("run_lock.take", "run_lock.HEARTBEAT_SECONDS = 0.1; run_lock.take", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "60"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "taken\n"
    write_lock(tmp_path)
    _, err = process.communicate(timeout=600)
    assert process.returncode == run_lock.EXIT_LOCK_LOST
    (line,) = err.splitlines()
    assert "was taken over by process 7 of ann on far" in line and "this one stops" in line
