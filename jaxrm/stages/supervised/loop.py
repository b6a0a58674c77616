"""The host loop of everything that is trained from a data set: SFT, reward models, DPO.

It reads top to bottom: take a batch, step, log, evaluate, save. Metrics are fetched one step late, while the devices
are busy with the next. What is saved is a function of the step alone: a run that was killed and started again ends with
the same parameters, bit for bit, as one that was not.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxrm.algorithms.state import TrainState
from jaxrm.data.loader import BatchIterator
from jaxrm.errors import UserError, flag, option
from jaxrm.models import lora
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.preemption import StoppedError, StopRequest, agree
from jaxrm.stages.supervised.reporter import TrainingReporter

_AGREE_EVERY = 8  # steps


@dataclass(frozen=True)
class Training:
    """All that the loop needs beside the state.

    Attributes:
      train_step: from `jaxrm.algorithms.train_step.build_train_step`.
      frozen: parameters that are not trained; ``{}`` where all are.
      evaluate: held-out metrics of parameters, among them ``eval_loss``; it may raise `StoppedError`.
      loader: training batches, at the position that belongs to the state.
      data_fingerprint: of the training data, saved with every checkpoint.
      to_devices: puts a batch of this process on the devices.
      num_steps: updates in all, those already made included.
      eval_every: updates between evaluations; the first and the last parameters are always evaluated.
      checkpoints: where to save.
      checkpoint_every: updates between checkpoints; the last one is always saved.
      reporter: of every step and evaluation.
      stop: looked at after every step.
    """

    train_step: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]
    frozen: Any
    evaluate: Callable[[Any, StopRequest], dict[str, float]]
    loader: BatchIterator
    data_fingerprint: str
    to_devices: Callable[[dict[str, np.ndarray]], Any]
    num_steps: int
    eval_every: int
    checkpoints: Checkpoints
    checkpoint_every: int
    reporter: TrainingReporter
    stop: StopRequest


def fit(state: TrainState, training: Training, *, evaluation_pending: bool = False) -> tuple[TrainState, bool]:
    """Train from ``state.step`` to ``training.num_steps``, or until asked to stop.

    Args:
      state: where to start; donated.
      training: everything else.
      evaluation_pending: the run stopped before the evaluation that belongs to ``state``.

    Returns:
      The state, and whether the run is complete. It is not where it was asked to stop.

    Raises:
      UserError: when the loss or the gradient is not finite; nothing of that step is saved.
    """
    step, num_steps = int(state.step), training.num_steps
    if step == 0 or evaluation_pending:
        loss = _evaluate(training, step, state)
        if loss is None:
            return state, False
        if step > 0:
            training.checkpoints.add_loss(step, loss)
    late, is_stopping = _LateMetrics(training), False
    while step < num_steps:
        batch = next(training.loader)
        placed = training.to_devices(batch)
        state, metrics = training.train_step(state, training.frozen, placed)
        step += 1
        training.stop.has_progress = True
        late.report()  # of the step before, while this one runs
        late.add(step, metrics, _num_tokens(batch, placed))

        is_last, loss = step == num_steps, None
        saving = is_last or step % training.checkpoint_every == 0
        if is_last or step % training.eval_every == 0:
            late.report()
            loss = _evaluate(training, step, state)
            is_stopping = loss is None  # the same command evaluates
        if saving:
            late.report()
        # Looked at last, so that a signal during what was slow saves this very step. Processes that must agree wait
        # for each other, so they do it every few steps only.
        agreeing = saving or jax.process_count() == 1 or step % _AGREE_EVERY == 0
        is_stopping = is_stopping or (agreeing and agree(training.stop.requested))
        if saving or is_stopping:
            late.report()
            _save(training, step, state, loss, is_passing=not saving)
        late.skip_time()  # evaluating and saving are not training time
        if is_stopping:
            break
    training.checkpoints.wait()
    return state, step >= num_steps and not is_stopping


class _LateMetrics:
    """Metrics of the latest step, fetched while the next one runs.

    Fetching waits for the devices. One step late, they always have work meanwhile.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._latest: tuple[int, dict[str, jax.Array], int] | None = None
        self._since = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array], num_tokens: int) -> None:
        """Metrics of a step, on the devices still."""
        self._latest = (step, metrics, num_tokens)

    def report(self) -> None:
        """Fetch and report the latest metrics, once."""
        if self._latest is None:
            return
        (step, arrays, num_tokens), self._latest = self._latest, None
        metrics = {name: float(value) for name, value in jax.device_get(arrays).items()}
        _check_finite(step, metrics, self._training.checkpoints)
        seconds = time.perf_counter() - self._since
        self._since += seconds
        numbers = {name: value for name, value in metrics.items() if not math.isnan(value)}
        speed = {"tokens_per_second": num_tokens / seconds, "step_seconds": seconds}
        self._training.reporter.step(step, numbers | speed)

    def skip_time(self) -> None:
        """Leave the time since the last report out of the next one, unless a step is running."""
        if self._latest is None:
            self._since = time.perf_counter()


def _num_tokens(batch: dict[str, np.ndarray], placed: Any) -> int:
    """Tokens of a whole batch: those of this process, times the shares, which have about as many each."""
    num_shares = jax.tree.leaves(placed)[0].shape[0] // len(batch["segment_ids"])
    return int(np.count_nonzero(batch["segment_ids"])) * num_shares


def _evaluate(training: Training, step: int, state: TrainState) -> float | None:
    """Held-out loss of a state; None where the evaluation was asked to stop."""
    try:
        held_out = training.evaluate(lora.join(training.frozen, state.params), training.stop)
    except StoppedError:
        return None
    training.reporter.evaluation(step, held_out)
    return held_out["eval_loss"]


def _save(training: Training, step: int, state: TrainState, loss: float | None, *, is_passing: bool) -> None:
    arrays = {"params": state.params, "opt_state": state.opt_state}
    position = {"loader": training.loader.get_state(), "data": training.data_fingerprint}
    training.checkpoints.save(step, arrays, position, loss, is_passing=is_passing)


def restore(
    abstract: TrainState, checkpoints: Checkpoints, loader: BatchIterator, data_fingerprint: str, key: jax.Array
) -> TrainState:
    """State of the latest checkpoint, and the loader moved to where it was.

    Args:
      abstract: shapes and shardings of the state.
      checkpoints: at least one of them is there.
      loader: moved to the position that belongs to the state.
      data_fingerprint: of the data that the loader reads.
      key: of the run, which follows from its seed.

    Raises:
      UserError: where the data are not those of the checkpoint.
    """

    def check_progress(step: int, progress: dict[str, Any]) -> None:
        if progress["data"] != data_fingerprint:
            raise UserError(
                f"{option('data.path')} no longer gives the examples that {checkpoints.folder / str(step)} was trained "
                "on, so its position in them means nothing; give the same data and tokenizer, or put the run aside "
                f"with {flag('on_existing')}=restart"
            )

    abstract_arrays = {"params": abstract.params, "opt_state": abstract.opt_state}
    latest, progress, arrays = checkpoints.restore_latest(abstract_arrays, check_progress)
    loader.set_state(progress["loader"])
    # Through jit, since device_put refuses a sharding over the devices of other processes.
    place = jax.jit(lambda *scalars: scalars, out_shardings=(abstract.step.sharding, abstract.key.sharding))
    step, key = place(np.int32(latest), key)
    return TrainState(step, arrays["params"], arrays["opt_state"], key)


def _check_finite(step: int, metrics: dict[str, float], checkpoints: Checkpoints) -> None:
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
    if bad:
        checkpoints.wait()
        saved = checkpoints.steps()
        where = (
            f"the last good checkpoint is {checkpoints.folder / str(saved[-1])}" if saved else "nothing was saved yet"
        )
        raise UserError(
            f"step {step}: {' and '.join(bad)} is not finite, so the run stopped before saving it; {where}; "
            f"try a lower {flag('optimizer.lr')} or more {flag('optimizer.warmup')}"
        )
