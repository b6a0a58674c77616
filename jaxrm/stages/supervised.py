"""Training a loss on batches of tokens: state, checkpoints, metrics and signals around the host loop."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms import evaluation, supervised, train_step
from jaxrm.algorithms.state import TrainState, create
from jaxrm.algorithms.train_step import LossFn
from jaxrm.experiment import Experiment
from jaxrm.models import build, flops
from jaxrm.runtime import config as bridge
from jaxrm.runtime import partition
from jaxrm.runtime.checkpoint import Checkpoints, with_shardings
from jaxrm.runtime.metrics import open_metrics
from jaxrm.runtime.optimizer import build_optimizer, learning_rate
from jaxrm.runtime.preemption import catch_signals
from jaxrm.runtime.progress import Progress
from jaxrm.runtime.reporter import TrainingReporter
from jaxrm.runtime.run_folder import RunFolder
from jaxrm.stages.setup import OpenedModel, batch_placer


def train(
    config: Experiment,
    *,
    mesh: Mesh,
    model: OpenedModel,
    loss_fn: LossFn,
    loader: supervised.Loader,
    data_fingerprint: str,
    eval_batches: Sequence[dict[str, np.ndarray]],
    num_steps: int,
    folder: RunFolder,
) -> tuple[TrainState, bool]:
    """Train ``model`` on ``loss_fn`` in ``folder``, from its latest checkpoint if it has one.

    Args:
      config: the whole config.
      mesh: the devices.
      model: from `jaxrm.stages.setup.open_model`.
      loss_fn: of a `jaxrm.types.TokenBatch`.
      loader: training batches of this process.
      data_fingerprint: of the data behind it, from `jaxrm.data.loader.fingerprint`.
      eval_batches: held-out batches of this process.
      num_steps: updates in all.
      folder: the opened run.

    Returns:
      The last state, and whether it is that of ``num_steps`` (it is not where the run was asked to stop).
    """
    optimizer = build_optimizer(config.optimizer, num_steps)
    copied, rows = NamedSharding(mesh, PartitionSpec()), partition.batch_sharding(mesh)
    sharding = TrainState(
        step=copied,
        params=model.shardings,
        opt_state=partition.optimizer_shardings(optimizer, model.shapes, model.shardings, mesh),
        key=copied,
    )
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    if checkpoints.steps():
        shapes = jax.eval_shape(lambda params: create(params, optimizer, step_key), model.shapes)
        state = supervised.restore(with_shardings(shapes, sharding), checkpoints, loader, data_fingerprint, step_key)
    else:
        params = build.init_params(model.config, config.model, init_key, model.shardings)
        start = jax.jit(lambda p, k: create(p, optimizer, k), out_shardings=sharding, donate_argnums=0)
        state = start(params, step_key)

    place = batch_placer(mesh)
    first = int(state.step)
    shown = folder.is_writer and config.logging.progress
    with (
        open_metrics(folder, config.logging, after_step=first or None, run_config=bridge.as_dict(config)) as writer,
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
                batch_sharding=rows,
                num_microbatches=config.num_microbatches,
            ),
            eval_step=evaluation.build_eval_step(loss_fn, params_sharding=model.shardings, batch_sharding=rows),
            loader=loader,
            data_fingerprint=data_fingerprint,
            place=place,
            eval_batches=[place(batch) for batch in eval_batches],
            eval_every=config.evaluation.every,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint.every,
            reporter=TrainingReporter(
                writer,
                progress,
                every=config.logging.every,
                num_steps=num_steps,
                learning_rate=learning_rate(config.optimizer, num_steps),
                flops_per_token=flops.training_flops_per_token(model.config, config.data.max_length),
                dtype=config.model.dtype,
            ),
            stop=stop,
        )
    checkpoints.close()
    return state, finished
