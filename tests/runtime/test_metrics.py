"""Rows, progress, tables, and what is known of the machine."""

import importlib.util
import io
import json
import math
import resource
import signal
import sys
from types import SimpleNamespace

import pytest

from jaxrm.errors import UserError
from jaxrm.runtime.hardware import device_memory, host_memory_gib
from jaxrm.runtime.metrics import WALL_CLOCK, LoggingConfig, append_row, json_line, open_metrics, read_rows
from jaxrm.runtime.progress import Progress, format_seconds, format_value, print_table
from jaxrm.runtime.run_folder import RunFolder

QUIET = LoggingConfig(tensorboard=False)


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path, resumed=False, message="")


def train(folder, start, stop, after_step):
    with open_metrics(folder, QUIET, after_step=after_step) as metrics:
        for step in range(start, stop):
            metrics.write(step, {"loss": 1 / step, "tokens_per_second": 5.0})
            if step % 4 == 0:
                metrics.write(step, {"eval/loss": 2 / step})


def lasting(path):
    return [{name: x for name, x in row.items() if name not in WALL_CLOCK} for row in read_rows(path)]


def test_rows_are_json_lines_with_step_first_and_time_last(folder):
    with open_metrics(folder, QUIET, after_step=None) as metrics:
        metrics.write(3, {"loss": 0.5, "accuracy": None})
        (line,) = folder.metrics.read_text().splitlines()  # there before the writer is closed
    row = json.loads(line)
    assert list(row) == ["step", "loss", "time"]
    assert (row["step"], row["loss"]) == (3, 0.5)
    assert row["time"] > 1.6e9


@pytest.mark.parametrize("cut", ["", '{"step": 10, "lo'])
def test_an_interrupted_runs_rows_equal_an_unbroken_runs(folder, tmp_path, cut):
    (tmp_path / "unbroken").mkdir()
    unbroken = RunFolder(tmp_path / "unbroken", resumed=False, message="")
    train(unbroken, 1, 13, None)
    train(folder, 1, 10, None)  # killed in step 10, the last checkpoint at 6
    with folder.metrics.open("a") as file:
        file.write(cut)
    train(folder, 7, 13, 6)
    assert lasting(folder.metrics) == lasting(unbroken.metrics)
    assert [row["step"] for row in read_rows(folder.metrics)] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]


def test_a_fresh_start_keeps_no_rows_and_a_resume_its_own(folder):
    """A resume at step zero keeps the rows of step zero."""
    with open_metrics(folder, QUIET, after_step=None) as metrics:
        metrics.write(0, {"eval/loss": 1.0})
        metrics.write(1, {"loss": 1.0})
    open_metrics(folder, QUIET, after_step=0).close()
    assert [row["step"] for row in read_rows(folder.metrics)] == [0]
    open_metrics(folder, QUIET, after_step=None).close()
    assert read_rows(folder.metrics) == []


def test_rows_that_stay_keep_their_text(folder):
    folder.metrics.write_text('{"step":1,   "loss":0.10}\n{"step":2}\n')
    open_metrics(folder, QUIET, after_step=1).close()
    assert folder.metrics.read_text() == '{"step":1,   "loss":0.10}\n'


def test_a_broken_row_in_the_middle_is_named(folder):
    folder.metrics.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is 'nonsense'; required one JSON object a line"):
        read_rows(folder.metrics)


def test_not_a_number_is_valid_json_that_float_reads():
    line = json_line({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert math.isnan(float(row["a"])) and float(row["b"]) == math.inf and float(row["c"]) == -math.inf
    assert row["d"] == 1.5


def test_a_process_that_does_not_write_leaves_no_file(tmp_path):
    with open_metrics(RunFolder(tmp_path, False, "", is_writer=False), LoggingConfig(), after_step=None) as metrics:
        metrics.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_same_numbers(folder):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with open_metrics(folder, LoggingConfig(), after_step=None) as metrics:
        metrics.write(7, {"loss": 0.25, "eval/loss": 0.5})
    (path,) = folder.tensorboard.iterdir()
    data, found, at = path.read_bytes(), {}, 0
    while at < len(data):  # a record is its length (8 bytes), a checksum (4), the event, a checksum (4)
        length = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + length])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        at += 16 + length
    assert found == {"loss": (7, 0.25), "eval/loss": (7, 0.5)}


def test_logging_that_cannot_work_is_refused_in_the_config():
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(UserError, match=r"LoggingConfig\.wandb_project is 'x', but wandb is not installed"):
            LoggingConfig(wandb_project="x")
    with pytest.raises(UserError, match=r"LoggingConfig\.every is 0; it must be at least 1"):
        LoggingConfig(every=0)


def test_wandb_continues_under_the_same_id(folder, monkeypatch):
    calls, rows = [], []
    run = SimpleNamespace(log=lambda row, step: rows.append((step, row)), finish=lambda: rows.append("finished"))
    fake = SimpleNamespace(init=lambda **options: calls.append(options) or run, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = LoggingConfig(tensorboard=False, wandb_project="p")
    for after_step in (None, 4):
        with open_metrics(folder, config, after_step=after_step, run_config={"seed": 1}) as metrics:
            metrics.write(5, {"loss": 1.0})
    assert rows == [(5, {"loss": 1.0}), "finished"] * 2
    assert calls[0]["id"] == calls[1]["id"]
    assert (calls[0]["project"], calls[0]["config"], calls[0]["resume"]) == ("p", {"seed": 1}, "allow")


def test_samples_are_appended_one_a_line(tmp_path):
    for text in ("a\nb", "ü"):
        append_row(tmp_path / "samples.jsonl", {"text": text})
    assert [row["text"] for row in read_rows(tmp_path / "samples.jsonl")] == ["a\nb", "ü"]


def test_a_row_after_a_torn_one_is_a_line_of_its_own(tmp_path):
    path = tmp_path / "queue.jsonl"
    append_row(path, {"name": "a"})
    with path.open("ab") as file:
        file.write('{"name": "ü'.encode()[:-1])
    for name in "bc":
        append_row(path, {"name": name})
    assert path.read_text() == '{"name": "a"}\n{"name": "b"}\n{"name": "c"}\n'


def test_a_row_is_written_whole_or_refused(tmp_path):
    """A limit on the size of files makes a write short, as a disk that is nearly full does."""
    path = tmp_path / "queue.jsonl"
    append_row(path, {"name": "a"})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, before[1]))
        with pytest.raises(OSError, match="File too large"):
            append_row(path, {"name": "b"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    append_row(path, {"name": "c"})
    assert [row["name"] for row in read_rows(path)] == ["a", "c"]


class Clock:
    """Seconds that pass only when a test says so."""

    now = 100.0

    def __call__(self):
        return self.now


def test_plain_progress_prints_a_line_every_ten_seconds():
    """It prints the first step and the last as well."""
    clock, out = Clock(), io.StringIO()
    with Progress("train", 101, done=40, stream=out, clock=clock) as progress:
        clock.now += 500  # compilation does not count
        for done in range(41, 102):
            progress.update(done, loss=2.3123456, tokens_per_second=12345.6, note=None)
            clock.now += 2
    lines = out.getvalue().splitlines()
    assert lines[0] == "train 41/101 steps · loss 2.312 · tokens/s 12,346"
    assert lines[1] == "train 46/101 steps · loss 2.312 · tokens/s 12,346 · 1:50 left"
    assert lines[-1] == "train 101/101 steps · loss 2.312 · tokens/s 12,346"
    assert len(lines) == 13


def test_plain_progress_ends_with_where_it_stopped():
    out = io.StringIO()
    with pytest.raises(ValueError), Progress("tokenise", None, unit="records", stream=out, clock=Clock()) as progress:
        progress.update(1)
        progress.update(2000)
        raise ValueError
    assert out.getvalue() == "tokenise 1 records\ntokenise 2,000 records\n"


def test_progress_that_is_not_enabled_is_silent():
    out = io.StringIO()
    with Progress("train", 3, enabled=False, stream=out) as progress:
        progress.update(3)
        progress.print("x")
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Progress("train", 3, stream=out) as progress:
        progress.update(1, loss=2.5)
        progress.print("[a sample]")
        progress.update(3, loss=1.5)
    assert "3/3" in out.getvalue() and "loss 1.5" in out.getvalue() and "[a sample]" in out.getvalue()


def test_a_table_sets_numbers_right_and_words_left():
    out = io.StringIO()
    print_table("Held out", ["", "before", "after"], [["loss", 2.31234, 1.5], ["tokens", 12345, None]], stream=out)
    assert out.getvalue() == (
        "\nHeld out\n        before  after\n──────  ──────  ─────\nloss     2.312    1.5\ntokens  12,345      –\n\n"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(3e-6, "3e-06"), (0.12345, "0.1235"), (12345.6, "12,346"), (7, "7"), (True, "True"), (math.nan, "nan")],
)
def test_values_are_formatted_to_be_read(value, text):
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00"), (725, "12:05"), (11229, "3:07:09"), (187200, "2 d 4 h")]
)
def test_durations_are_formatted_to_be_read(seconds, text):
    assert format_seconds(seconds) == text


def test_host_memory_is_counted_and_cpu_devices_count_none():
    before = host_memory_gib()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert 0.01 < before <= host_memory_gib() < 1000
    assert device_memory() is None
