"""A training step on all devices against one: the same loss, and how much of the speed of one is left to each."""

import jax
import numpy as np
from accelerator import here, training
from accelerator.report import LeftOutError, Report
from accelerator.shapes import Shape

from jaxrm.inference.sharded_model import shard_model
from jaxrm.planning.programs import stage_programs
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stage_config import SFT
from jaxrm.stages.objective import build_objective

LOSS_BOUND = 1e-2  # of bfloat16, whose sums have another order on other meshes


def scale(shape: Shape, report: Report) -> None:
    """The smallest model, as many rows on each device; on all of them the rows of one, again and again."""
    devices = jax.devices()
    if len(devices) == 1:
        raise LeftOutError("there is one device")
    name = shape.models[-1]
    seconds, losses = {}, {}
    for count in (1, len(devices)):
        report.doing(f"{name} on {count}")
        config = training.with_sizes(SFT(), name, shape, num_devices=count)
        mesh = build_mesh(config.mesh, devices[:count])
        (program,) = stage_programs(config, mesh).programs
        objective = build_objective(config, shard_model(config.model, mesh))
        step = training.Steps(program.jitted, *training.first_arguments(config, program, objective, repeats=count))
        seconds[count] = here.best_seconds(step, rounds=shape.rounds)
        losses[count] = np.asarray([float(loss) for loss in step.losses[:2]])
    one, all_ = (seconds[count] for count in (1, len(devices)))
    tokens = shape.rows * shape.length
    report.row(
        f"{name}, {tokens} tokens a device, fsdp {len(devices)}",
        len(devices) * tokens / all_,
        "tokens/s",
        beside=f"one device {tokens / one:,.0f}; efficiency {one / all_:.2f}",
    )
    difference = float(np.max(np.abs(losses[len(devices)] - losses[1]) / np.abs(losses[1])))
    report.within("loss of two steps: difference from one device", difference, LOSS_BOUND)
