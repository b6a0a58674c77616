"""Stopping a run from outside."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxrm.runtime.preemption import EXIT_PREEMPTED, StoppedError, StopRequest, agree, catch_signals

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_once_and_the_block_goes_on(number, capfd):
    with catch_signals() as stop:
        assert not stop.requested and stop.signal_name is None
        os.kill(os.getpid(), number)
        assert stop.requested and stop.signal_name == signal.Signals(number).name
    assert "saving after this step" in capfd.readouterr().err


def test_a_second_ctrl_c_stops_at_once_but_a_second_sigterm_not(capfd):
    with catch_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    with pytest.raises(KeyboardInterrupt), catch_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("error", [None, ValueError])
def test_the_handlers_before_come_back_however_the_block_ends(error):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        with catch_signals():
            assert signal.getsignal(signal.SIGTERM) != before[0]
            if error is not None:
                raise error
    except ValueError:
        pass
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_thread_that_may_not_catch_signals_still_runs():
    requested = []

    def work():
        with catch_signals() as stop:
            requested.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert requested == [False]


def test_one_process_agrees_with_itself():
    assert agree(True) is True
    assert agree(False) is False


LOOP = """
import sys, time
from jaxrm.runtime.preemption import EXIT_PREEMPTED, catch_signals
with catch_signals() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("saved", flush=True)
sys.exit(EXIT_PREEMPTED)
"""


def test_a_terminated_process_saves_and_exits_as_documented():
    process = subprocess.Popen([sys.executable, "-c", LOOP], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    out, err = process.communicate(timeout=600)
    assert (out, process.returncode) == (b"saved\n", 75)
    assert EXIT_PREEMPTED == os.EX_TEMPFAIL == 75
    assert err == b"\njaxrm: SIGTERM: saving after this step\n"


def test_what_is_in_the_middle_is_left_between_two_items():
    stop, seen = StopRequest(), []
    with pytest.raises(StoppedError):
        for item in stop.checked(range(5)):
            seen.append(item)
            stop.requested = item == 2
    assert seen == [0, 1, 2]


COMMAND = """
import gc, sys, time
from jaxrm.runtime import preemption
preemption.leave_on_signals()
{before}
def work():
    with preemption.catch_signals(has_progress={has_progress}) as stop:
        try:
            {work}
        finally:
            print("unwound", flush=True)
    return 75 if stop.requested else 0
try:
    sys.exit(preemption.run_preemptible(work, lambda: "the same command continues"))
except KeyboardInterrupt:
    sys.exit(130)
"""
LOOPING = 'print("ready", flush=True)\n            while not stop.requested: time.sleep(0.01)'
# Ready is said from a thread, when the main one is in C already.
IN_C = """import hashlib, threading
            threading.Timer(0.5, lambda: print("ready", flush=True)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)"""
DROPPING = """gc.callbacks.append(lambda *_: time.sleep(0.01)); print("ready", flush=True)
            while True: gc.collect(), time.sleep(0.01)"""
STEP = 'print("ready", flush=True); time.sleep(30)'
DONE = 'import atexit; atexit.register(lambda: (print("ready", flush=True), time.sleep(30)))'

FINALIZED = """import os, types
            class Last:
                def __del__(self, write=os.write, sleep=time.sleep):
                    write(1, b"ready\\n"), sleep(1)
            sys.modules["last"] = types.ModuleType("last")
            sys.modules["last"].last = Last()"""


def stop_command(signals, **parts):
    """Exit status, stdout and stderr of a command that gets signals once it is ready."""
    code = COMMAND.format(**{"before": "", "has_progress": False, "work": LOOPING} | parts)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert b"ready\n" in iter(process.stdout.readline, b"")
    for number in signals:
        process.send_signal(number)
        time.sleep(0.5 if len(signals) > 1 else 0)
    out, err = process.communicate(timeout=600)
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("parts", "out"),
    [
        ({}, "unwound\n"),
        ({"before": 'print("ready", flush=True); time.sleep(30)'}, ""),
        ({"work": DROPPING}, "unwound\n"),
    ],
    ids=["in a loop without progress", "before its work", "in a callback that drops errors"],
)
def test_a_command_with_nothing_to_save_ends_at_once_in_one_line(number, parts, out):
    status, printed, error = stop_command([number], **parts)
    assert (status, printed) == (EXIT_PREEMPTED, out)
    assert error.startswith(f"\njaxrm: {signal.Signals(number).name}: stopped; ") and error.count("\n") == 2


def test_a_command_with_progress_saves_first():
    status, printed, error = stop_command([signal.SIGTERM], has_progress=True)
    assert (status, printed) == (EXIT_PREEMPTED, "unwound\n")
    assert error == "\njaxrm: SIGTERM: saving after this step\n"


def test_a_signal_in_a_long_compilation_is_heard():
    """Python's handlers wait for the end of a call of C; a thread does not."""
    status, _, error = stop_command([signal.SIGTERM], work=IN_C, before="preemption._PATIENCE = 0.5")
    assert status == EXIT_PREEMPTED
    assert error == "\njaxrm: SIGTERM: stopped; the same command continues\n"


def test_a_signal_after_the_end_changes_nothing():
    status, _, error = stop_command([signal.SIGTERM], work=DONE)
    assert (status, error) == (0, "")


def test_threads_that_are_torn_down_print_nothing():
    """As those that read a checkpoint do, whose event loop is gone by then."""
    work = LOOPING.replace("while", "import os\n            while") + "\n        except BaseException:\n"
    work += '            os.write(2, b"Event loop is closed"); raise'
    status, _, error = stop_command([signal.SIGTERM], work=work)
    assert (status, error) == (EXIT_PREEMPTED, "\njaxrm: SIGTERM: stopped; the same command continues\n")


def test_a_signal_while_python_ends_changes_nothing():
    """Python has given the handlers up by then."""
    status, _, error = stop_command([signal.SIGTERM], work=FINALIZED)
    assert (status, error) == (0, "")


def test_a_second_ctrl_c_ends_a_command_at_once():
    """It does not wait for the step that the first one waits for."""
    status, printed, _ = stop_command([signal.SIGINT, signal.SIGINT], has_progress=True, work=STEP)
    assert (status, printed) == (130, "unwound\n")
    status, _, error = stop_command([signal.SIGINT, signal.SIGINT], work=IN_C)
    assert (status, error) == (130, "\njaxrm: interrupted\n")
