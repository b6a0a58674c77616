"""Which rows a run writes, and what the bar is told."""

import jax
import pytest

from jaxrm.models import flops
from jaxrm.runtime import hardware
from jaxrm.stages.supervised.reporter import TrainingReporter

METRICS = {"loss": 2.0, "tokens_per_second": 1000.0}


class Recorder:
    """Stands for the metrics files and the bar."""

    def __init__(self):
        self.rows, self.shown, self.lines = {}, {}, []

    def write(self, step, metrics):
        self.rows[step] = dict(metrics)

    def update(self, step, **shown):
        self.shown[step] = shown

    def print(self, line):
        self.lines.append(line)


def reporter(recorder, every=3, num_steps=8, flops_per_token=1e9):
    return TrainingReporter(
        recorder,
        recorder,
        every=every,
        num_steps=num_steps,
        learning_rate=lambda step: 0.1 * step,
        flops_per_token=flops_per_token,
        dtype="bfloat16",
    )


def test_the_bar_gets_every_step_and_the_files_every_third():
    """The files get the last step as well."""
    recorder = Recorder()
    for step in range(1, 9):
        reporter(recorder).step(step, METRICS | {"loss": float(step)})
    assert list(recorder.shown) == list(range(1, 9))
    assert list(recorder.rows) == [3, 6, 8]
    assert recorder.rows[6]["loss"] == recorder.shown[6]["loss"] == 6.0
    assert recorder.rows[6]["learning_rate"] == pytest.approx(0.5)  # that of the step's own update


def test_what_is_unknown_is_left_out_of_the_rows(monkeypatch):
    """A CPU has no known peak and counts no memory."""
    monkeypatch.setattr(hardware, "device_memory", lambda: None)
    recorder = Recorder()
    reporter(recorder).step(3, METRICS)
    assert recorder.shown[3]["mfu"] is None
    assert set(recorder.rows[3]) == {*METRICS, "host_memory_gib", "learning_rate"}


def test_mfu_is_the_share_of_the_peak_of_all_devices(monkeypatch):
    """1000 tokens/s at 1 GFLOP each, on eight devices of 0.5 TFLOP/s."""
    monkeypatch.setattr(flops, "peak_flops", lambda kind, dtype: 0.5e12)
    recorder = Recorder()
    reporter(recorder).step(3, METRICS)
    assert jax.device_count() == 8
    assert recorder.rows[3]["mfu"] == recorder.shown[3]["mfu"] == pytest.approx(1e12 / (8 * 0.5e12))


def test_an_evaluation_always_has_a_row_and_a_line():
    recorder = Recorder()
    reporter(recorder).evaluation(1, {"eval_loss": 1.5, "eval_accuracy": 0.25})
    assert recorder.rows == {1: {"eval_loss": 1.5, "eval_accuracy": 0.25}}
    assert recorder.lines == ["step 1: held-out loss 1.5 · accuracy 0.25"]
