"""Training an objective in a run's folder: the state, checkpoints, metrics and signals around the host loop."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxrm.algorithms import eval_step, train_step
from jaxrm.algorithms.optimizer import build_optimizer, learning_rate
from jaxrm.algorithms.state import TrainState, create
from jaxrm.config import dicts
from jaxrm.inference import sharded_model
from jaxrm.inference.parameters import init_key
from jaxrm.inference.sharded_model import to_devices
from jaxrm.models import flops, lora
from jaxrm.runtime.checkpoint import Checkpoints, with_shardings
from jaxrm.runtime.metrics import MetricsWriter, open_metrics
from jaxrm.runtime.preemption import EXIT_PREEMPTED, StopRequest, catch_signals
from jaxrm.runtime.progress import Progress
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.sharding import partition
from jaxrm.stages.inputs.training_data import TrainingData
from jaxrm.stages.late_evaluation import is_evaluation_pending
from jaxrm.stages.objective import Objective
from jaxrm.stages.stage import Stage
from jaxrm.stages.supervised import loop
from jaxrm.stages.supervised.reporter import TrainingReporter

InitParams = Callable[[jax.Array], Any]


class Trained(NamedTuple):
    """What a training came to.

    Attributes:
      step: updates made.
      params: of the model, frozen ones among them.
      is_complete: whether the last step was reached. It was not where the run was asked to stop.
    """

    step: int
    params: Any
    is_complete: bool


Evaluate = Callable[[Any, StopRequest], dict[str, float]]


def train(
    stage: Stage,
    folder: RunFolder,
    objective: Objective,
    data: TrainingData,
    *,
    init_params: InitParams | None = None,
    evaluate: Evaluate | None = None,
) -> Trained:
    """Train in ``folder``, from its latest checkpoint if it has one.

    Args:
      stage: whose config says how.
      folder: the opened run.
      objective: what is minimized, over which parameters.
      data: batches.
      init_params: draws or reads the first parameters, given a key; `Stage.init_params` by default.
      evaluate: held-out metrics of parameters, among them ``eval_loss``; `held_out_loss` by default. It looks at the
        request to stop between batches.
    """
    config, num_steps = stage.config, data.num_steps
    optimizer = build_optimizer(config.optimizer, num_steps)
    sharding = sharded_model.state_shardings(objective.model, optimizer, stage.mesh, offload=config.optimizer.offload)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    state, frozen = _init_or_restore(
        stage, objective, data, optimizer, sharding, checkpoints, init_params or stage.init_params
    )

    first_step = int(state.step)
    pending = is_evaluation_pending(
        folder, checkpoints, first_step, num_steps, config.evaluation.every, lambda row: row.get("eval_loss")
    )
    with (
        open_metrics(folder, config.logging, after_step=first_step or None, run_config=dicts.to_dict(config)) as writer,
        Progress("train", num_steps, done=first_step, enabled=stage.show_progress) as progress,
        catch_signals(has_progress=False) as stop,
    ):
        training = loop.Training(
            train_step=train_step.build_train_step(
                objective.loss_fn,
                optimizer,
                state_sharding=sharding,
                batch_sharding=partition.batch_sharding(stage.mesh),
                frozen_sharding=objective.model.frozen_shardings,
                num_microbatches=config.num_microbatches,
            ),
            frozen=frozen,
            evaluate=evaluate or held_out_loss(stage, objective, data.eval_batches),
            loader=data.loader,
            data_fingerprint=data.fingerprint,
            to_devices=to_devices(stage.mesh, objective.batch_type),
            num_steps=num_steps,
            eval_every=config.evaluation.every,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint.every,
            reporter=_reporter(stage, objective, data, writer, progress),
            stop=stop,
        )
        state, finished = loop.fit(state, training, evaluation_pending=pending)
    checkpoints.close()
    return Trained(int(state.step), lora.join(frozen, state.params), finished)


def _reporter(
    stage: Stage, objective: Objective, data: TrainingData, writer: MetricsWriter, progress: Progress
) -> TrainingReporter:
    config = stage.config
    return TrainingReporter(
        writer,
        progress,
        every=config.logging.every,
        num_steps=data.num_steps,
        learning_rate=learning_rate(config.optimizer, data.num_steps),
        flops_per_token=flops.training_flops_per_token(
            objective.model.config,
            config.data.max_length,
            scalar_head=objective.has_scalar_head,
            lora=objective.model.lora,
        ),
        dtype=config.model.dtype,
    )


def _init_or_restore(
    stage: Stage,
    objective: Objective,
    data: TrainingData,
    optimizer: optax.GradientTransformation,
    sharding: TrainState,
    checkpoints: Checkpoints,
    init_params: InitParams,
) -> tuple[TrainState, Any]:
    """The state, and the frozen parameters."""
    _, step_key = jax.random.split(jax.random.key(stage.config.seed))
    is_resumed = bool(checkpoints.steps())
    frozen: Any = {}
    if not is_resumed or objective.model.lora.is_on:
        params, frozen = lora.split(init_params(init_key(stage.config.seed)))
    if is_resumed:
        shapes = jax.eval_shape(lambda params: create(params, optimizer, step_key), objective.model.trained_shapes)
        abstract = with_shardings(shapes, sharding)
        return loop.restore(abstract, checkpoints, data.loader, data.fingerprint, step_key), frozen
    # Donated: the first parameters become the state's, so that they are in memory once.
    start = jax.jit(lambda p, k: create(p, optimizer, k), out_shardings=sharding, donate_argnums=0)
    return start(params, step_key), frozen


def held_out_loss(stage: Stage, objective: Objective, batches: Sequence[dict[str, np.ndarray]]) -> Evaluate:
    """Function to the mean of the loss and its metrics over held-out batches of this process."""
    step = eval_step.build_eval_step(
        objective.loss_fn,
        params_sharding=objective.model.shardings,
        batch_sharding=partition.batch_sharding(stage.mesh),
    )
    place: Callable[[dict[str, np.ndarray]], Any] = to_devices(stage.mesh, objective.batch_type)
    placed = [place(batch) for batch in batches]
    return lambda params, stop: eval_step.evaluate(step, params, stop.checked(placed))


def exit_status(stage: Stage, trained: Trained, data: TrainingData) -> int:
    """0 for a run that is complete; else `EXIT_PREEMPTED`, with a line that says where it continues."""
    if trained.is_complete:
        return 0
    if stage.is_writer:
        print(f"Stopped and saved at step {trained.step} of {data.num_steps}; the same command continues from there.")
    return EXIT_PREEMPTED
