"""What a training run tells while it goes on: a progress bar for people, rows for files."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxrm.models import flops
from jaxrm.runtime import hardware
from jaxrm.runtime.metrics import MetricsWriter
from jaxrm.runtime.progress import Progress, format_value


class TrainingReporter:
    """Sends metrics to the progress bar at every step and to the files every so often.

    Args:
      writer: of the metrics files.
      progress: the bar.
      every: steps between rows of training metrics; evaluations always have one.
      num_steps: the last step, which always has a row.
      learning_rate: of a step, counted from 0.
      flops_per_token: forward and backward, for the share of the hardware's peak that is used (MFU).
      dtype: compute dtype, which the peak depends on.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        progress: Progress,
        *,
        every: int,
        num_steps: int,
        learning_rate: Callable[[int], Any],
        flops_per_token: float,
        dtype: str,
    ) -> None:
        self._writer, self._progress = writer, progress
        self._every, self._num_steps = every, num_steps
        self._learning_rate = learning_rate
        self._flops_per_token, self._dtype = flops_per_token, dtype

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one training step, with its ``tokens_per_second``."""
        rate = metrics["tokens_per_second"]
        mfu = flops.mfu(self._flops_per_token * rate, 1.0, jax.devices(), self._dtype)
        host, device = hardware.host_memory_gib(), hardware.device_memory()
        shown = f"{host if device is None else device.peak:.1f} GiB"
        self._progress.update(step, loss=metrics["loss"], tokens_per_second=rate, mfu=mfu, memory=shown)
        if step % self._every == 0 or step == self._num_steps:
            measured = {
                "learning_rate": float(self._learning_rate(step - 1)),
                "mfu": mfu,
                "host_memory_gib": host,
                "device_memory_gib": None if device is None else device.peak,
            }
            self._writer.write(step, {**metrics, **{name: x for name, x in measured.items() if x is not None}})

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out metrics after ``step`` updates; those with a slash in their names are details for the files."""
        self._writer.write(step, metrics)
        shown = " · ".join(
            f"{name.removeprefix('eval_')} {format_value(x)}" for name, x in metrics.items() if "/" not in name
        )
        self._progress.print(f"step {step}: held-out {shown}")
