"""The jitted programs of a stage with abstract sharded inputs (``ShapeDtypeStruct``), for ahead-of-time compilation.

The planner compiles what the stages run: the programs come from the builders that the stages use.
"""

import jax
from jax.sharding import Mesh

from jaxrm.algorithms import train_step
from jaxrm.algorithms.optimizer import build_optimizer
from jaxrm.algorithms.state import create
from jaxrm.errors import UserError, option
from jaxrm.inference import sharded_model
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.models import build
from jaxrm.models.flops import training_flops
from jaxrm.models.quantized_params import count_parameters
from jaxrm.planning import ppo_programs
from jaxrm.planning.abstract import BASE, Program, StagePrograms, abstract_batch
from jaxrm.planning.lengths import Lengths
from jaxrm.runtime.checkpoint import with_shardings
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import check_batch, check_row_length
from jaxrm.stage_config import PLANNED, PPO, TrainingConfig
from jaxrm.stages.objective import build_objective


def stage_programs(config: TrainingConfig, mesh: Mesh, lengths: Lengths | None = None) -> StagePrograms:
    """The programs of a stage on a mesh, whose devices need not exist; nothing is allocated, no weights are read.

    Args:
      config: of the stage.
      mesh: the devices.
      lengths: of prompts and responses in PPO; None for the longest.

    Raises:
      UserError: for an algorithm that has no plan, or a model or batch that does not fit the mesh.
    """
    if config.algorithm not in PLANNED:
        raise UserError(f"{option('algorithm')} is {config.algorithm!r}; what can be planned is {', '.join(PLANNED)}")
    check_batch(mesh, "data.batch_size", config.data.batch_size, config.num_microbatches)
    build.check_trainable(config.model, config.lora)
    decoder = sharded_model.shard_model(config.model, mesh, lora=config.lora)
    build.check_length(decoder.config, "data.max_length", config.data.max_length)
    if isinstance(config, PPO):
        return ppo_programs.build(config, mesh, decoder, lengths)
    return _supervised(config, mesh, decoder)


def _supervised(config: TrainingConfig, mesh: Mesh, decoder: ShardedModel) -> StagePrograms:
    """One program, the training step."""
    check_row_length(mesh, "data.max_length", config.data.max_length)
    objective = build_objective(config, decoder)
    optimizer = build_optimizer(config.optimizer, config.num_steps or 1000)
    sharding = sharded_model.state_shardings(objective.model, optimizer, mesh, offload=config.optimizer.offload)
    step = train_step.build_train_step(
        objective.loss_fn,
        optimizer,
        state_sharding=sharding,
        batch_sharding=partition.batch_sharding(mesh),
        frozen_sharding=objective.model.frozen_shardings,
        num_microbatches=config.num_microbatches,
    )
    shapes = objective.model.trained_shapes
    state = with_shardings(jax.eval_shape(lambda p: create(p, optimizer, jax.random.key(0)), shapes), sharding)
    base = with_shardings(objective.model.frozen_shapes, objective.model.frozen_shardings)
    rows, length = config.data.batch_size, config.data.max_length
    batch = abstract_batch(objective.batch_type, rows, length, mesh)
    model_flops = rows * training_flops(
        decoder.config, length, predicted=length, scalar_head=objective.has_scalar_head, lora=decoder.lora
    )
    program = Program("train step", step, (state, base, batch), rows * length, (state, base), model_flops)
    residents = {"state": state} | ({BASE: base} if base else {})
    counts = count_parameters(objective.model.shapes), count_parameters(shapes)
    return StagePrograms((program,), residents, *counts, decoder.config, decoder.kernels)
