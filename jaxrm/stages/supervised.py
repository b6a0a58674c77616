"""Training a loss on batches of tokens: state, checkpoints, metrics and signals around the host loop."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrm.algorithms import eval_step as evaluation
from jaxrm.algorithms import supervised, train_step
from jaxrm.algorithms.optimizer import build_optimizer, learning_rate
from jaxrm.algorithms.state import TrainState, create
from jaxrm.algorithms.train_step import LossFn
from jaxrm.config import dicts
from jaxrm.data.loader import BatchIterator
from jaxrm.experiment import Experiment
from jaxrm.inference import sharded_model
from jaxrm.inference.sharded_model import ShardedModel, to_devices
from jaxrm.models import flops
from jaxrm.runtime.checkpoint import Checkpoints, with_shardings
from jaxrm.runtime.metrics import open_metrics
from jaxrm.runtime.preemption import catch_signals
from jaxrm.runtime.progress import Progress
from jaxrm.runtime.reporter import TrainingReporter
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.sharding import partition


def train(
    config: Experiment,
    *,
    mesh: Mesh,
    model: ShardedModel,
    first_params: Callable[[jax.Array], Any],
    loss_fn: LossFn,
    batch_type: type,
    loader: BatchIterator,
    data_fingerprint: str,
    evaluate: Callable[[Any], dict[str, float]],
    num_steps: int,
    folder: RunFolder,
) -> tuple[TrainState, bool]:
    """Train ``model`` on ``loss_fn`` in ``folder``, from its latest checkpoint if it has one.

    Args:
      config: the whole config.
      mesh: the devices.
      model: from `jaxrm.inference.sharded_model.shard_model` or `shard_scalar_model`.
      first_params: draws or reads the first parameters, given a key.
      loss_fn: what to minimize.
      batch_type: the batch that it takes, of `jaxrm.types`.
      loader: training batches of this process.
      data_fingerprint: of the data behind it, from `jaxrm.data.loader.fingerprint`.
      evaluate: held-out metrics of parameters, among them ``eval_loss``.
      num_steps: updates in all.
      folder: the opened run.

    Returns:
      The last state, and whether it is that of ``num_steps`` (it is not where the run was asked to stop).
    """
    optimizer = build_optimizer(config.optimizer, num_steps)
    sharding = sharded_model.state_shardings(model, optimizer, mesh, offload=config.optimizer.offload)
    _, step_key = jax.random.split(jax.random.key(config.seed))
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    if checkpoints.steps():
        shapes = jax.eval_shape(lambda params: create(params, optimizer, step_key), model.shapes)
        state = supervised.restore(with_shardings(shapes, sharding), checkpoints, loader, data_fingerprint, step_key)
    else:
        start = jax.jit(lambda p, k: create(p, optimizer, k), out_shardings=sharding, donate_argnums=0)
        state = start(first_params(init_key(config.seed)), step_key)

    first = int(state.step)
    shown = folder.is_writer and config.logging.progress
    with (
        open_metrics(folder, config.logging, after_step=first or None, run_config=dicts.as_dict(config)) as writer,
        Progress("train", num_steps, done=first, enabled=shown) as progress,
        catch_signals() as stop,
    ):
        state, finished = supervised.fit(
            state,
            num_steps=num_steps,
            train_step=train_step.build_train_step(
                loss_fn,
                optimizer,
                state_sharding=sharding,
                batch_sharding=partition.batch_sharding(mesh),
                num_microbatches=config.num_microbatches,
            ),
            evaluate=evaluate,
            loader=loader,
            data_fingerprint=data_fingerprint,
            place=to_devices(mesh, batch_type),
            eval_every=config.evaluation.every,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint.every,
            reporter=TrainingReporter(
                writer,
                progress,
                every=config.logging.every,
                num_steps=num_steps,
                learning_rate=learning_rate(config.optimizer, num_steps),
                flops_per_token=flops.training_flops_per_token(
                    model.config, config.data.max_length, scalar_head=config.algorithm == "scalar_rm"
                ),
                dtype=config.model.dtype,
            ),
            stop=stop,
        )
    checkpoints.close()
    return state, finished


def init_key(seed: int) -> jax.Array:
    """Key that the first parameters of a run are drawn with."""
    return jax.random.split(jax.random.key(seed))[0]


def held_out_loss(
    loss_fn: LossFn, batch_type: type, batches: Sequence[dict[str, np.ndarray]], mesh: Mesh, params_sharding: Any
) -> Callable[[Any], dict[str, float]]:
    """Function from parameters to the mean of a loss and its metrics over held-out batches of this process."""
    eval_step = evaluation.build_eval_step(
        loss_fn, params_sharding=params_sharding, batch_sharding=partition.batch_sharding(mesh)
    )
    place: Callable[[dict[str, np.ndarray]], Any] = to_devices(mesh, batch_type)
    placed = [place(batch) for batch in batches]
    return lambda params: evaluation.evaluate(eval_step, params, placed)
