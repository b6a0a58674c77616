"""Stopping a run from outside."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxrm.runtime.preemption import EXIT_PREEMPTED, agree, catch_signals

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
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == (b"saved\n", 75)
    assert EXIT_PREEMPTED == os.EX_TEMPFAIL == 75
    assert err == b"\njaxrm: SIGTERM: saving after this step\n"
