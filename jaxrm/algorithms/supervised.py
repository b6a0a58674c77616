"""The host loop of everything that is trained from a data set: SFT, and reward models after it.

It reads top to bottom: take a batch, step, log, evaluate, save. Metrics are fetched one step late, while the devices
are busy with the next, and what is saved is a function of the step alone, so a run that was killed and started again
ends with the same parameters, bit for bit, as one that was not.
"""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from jaxrm.algorithms.state import TrainState
from jaxrm.data.loader import BatchIterator
from jaxrm.errors import UserError, flag, option
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.preemption import StopRequest, agree

_AGREE_EVERY = 8  # steps


class Reporter(Protocol):
    """Where a run tells what happens: console, files, dashboards."""

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of one training step."""
        ...

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Held-out metrics after ``step`` updates."""
        ...


def fit(
    state: TrainState,
    *,
    num_steps: int,
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    evaluate: Callable[[Any], dict[str, float]],
    loader: BatchIterator,
    data_fingerprint: str,
    place: Callable[[dict[str, np.ndarray]], Any],
    eval_every: int,
    checkpoints: Checkpoints,
    checkpoint_every: int,
    reporter: Reporter,
    stop: StopRequest,
) -> tuple[TrainState, bool]:
    """Train from ``state.step`` to ``num_steps``, or until asked to stop.

    Args:
      state: where to start; donated.
      num_steps: updates in all, those already made included.
      train_step: from `jaxrm.algorithms.train_step.build_train_step`.
      evaluate: held-out metrics of parameters, among them ``eval_loss``.
      loader: training batches, at the position that belongs to ``state``.
      data_fingerprint: of the training data, kept with every checkpoint.
      place: puts a batch of this process on the devices.
      eval_every: updates between evaluations; the first and last parameters are always evaluated.
      checkpoints: where to save.
      checkpoint_every: updates between checkpoints; the last one is always saved.
      reporter: told of every step and evaluation.
      stop: asked after every step.

    Returns:
      The state, and whether it reached ``num_steps``.

    Raises:
      UserError: when the loss or the gradient is not finite; nothing of that step is saved.
    """
    step = int(state.step)
    if step == 0:
        reporter.evaluation(0, evaluate(state.params))

    unreported: tuple[int, dict[str, jax.Array], int] | None = None
    reported_at = time.perf_counter()

    def report() -> None:
        """Fetch the metrics of the latest step, once, and tell them."""
        nonlocal unreported, reported_at
        if unreported is None:
            return
        (at, arrays, tokens), unreported = unreported, None
        metrics = {name: float(value) for name, value in jax.device_get(arrays).items()}
        _check_finite(at, metrics, checkpoints)
        seconds = time.perf_counter() - reported_at
        reported_at += seconds
        seen = {name: value for name, value in metrics.items() if not math.isnan(value)}
        reporter.step(at, seen | {"tokens_per_second": tokens / seconds, "step_seconds": seconds})

    while step < num_steps:
        batch = next(loader)
        placed = place(batch)
        state, metrics = train_step(state, placed)
        step += 1
        report()  # of the step before, while this one runs
        parts = jax.tree.leaves(placed)[0].shape[0] // len(batch["segment_ids"])  # about as many tokens in each
        unreported = (step, metrics, int(np.count_nonzero(batch["segment_ids"])) * parts)

        last, loss = step == num_steps, None
        saving = last or step % checkpoint_every == 0
        if last or step % eval_every == 0:
            report()
            held_out = evaluate(state.params)
            reporter.evaluation(step, held_out)
            loss = held_out["eval_loss"]
        if saving:
            report()
        # Asked last, so that a signal during what was slow saves this very step. Where processes must agree they wait
        # for each other, so they do it every few steps.
        asking = saving or jax.process_count() == 1 or step % _AGREE_EVERY == 0
        stopping = asking and agree(stop.requested)
        if saving or stopping:
            report()
            arrays = {"params": state.params, "opt_state": state.opt_state}
            position = {"loader": loader.get_state(), "data": data_fingerprint}
            checkpoints.save(step, arrays, position, loss)
        if unreported is None:
            reported_at = time.perf_counter()  # evaluating and saving are not training time
        if stopping:
            break
    checkpoints.wait()
    return state, step >= num_steps


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
    latest = checkpoints.steps()[-1]
    progress = checkpoints.progress(latest)
    if progress["data"] != data_fingerprint:
        raise UserError(
            f"{option('data.path')} no longer gives the examples that {checkpoints.folder / str(latest)} was "
            f"trained on, so "
            "its position in them means nothing; give the same data and tokenizer, or put the run aside with "
            f"{flag('on_existing')}=restart"
        )
    arrays = checkpoints.restore(latest, {"params": abstract.params, "opt_state": abstract.opt_state})
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
