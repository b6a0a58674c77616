"""A step of SFT or of a scalar reward model: tokens/s, MFU counted by hand, memory beside the planner's.

The step of a seq2seq reward model is that of SFT with other rows, so it takes as long.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from accelerator import here
from accelerator.report import LeftOutError, Report
from accelerator.shapes import Shape

from jaxrm.algorithms.optimizer import OptimizerConfig, build_optimizer
from jaxrm.algorithms.state import create
from jaxrm.data.config import DataConfig
from jaxrm.inference import sharded_model
from jaxrm.models import build, heads
from jaxrm.models.build import ModelSource
from jaxrm.models.flops import mfu, training_flops_per_token
from jaxrm.planning.abstract import Program
from jaxrm.planning.programs import stage_programs
from jaxrm.planning.topology import GIB, Topology
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import SFT, ScalarRM, TrainingConfig
from jaxrm.stages.objective import Objective, build_objective
from jaxrm.types import ComparisonBatch, TokenBatch


def sft(shape: Shape, report: Report) -> None:
    """A step of supervised fine-tuning."""
    _train(SFT(), shape, report)


def reward_model(shape: Shape, report: Report) -> None:
    """A step of a scalar reward model on rows of one pair."""
    _train(ScalarRM(), shape, report)


def with_sizes(config: TrainingConfig, model: str, shape: Shape, *, num_devices: int) -> TrainingConfig:
    """The config of a step in bfloat16 of rows without padding, sharded over all devices."""
    return dataclasses.replace(
        config,
        model=ModelSource(preset=model, dtype="bfloat16"),
        data=DataConfig(path="task:safety", max_length=shape.length, batch_size=shape.rows * num_devices),
        optimizer=OptimizerConfig(lr=1e-5),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def first_arguments(
    config: TrainingConfig, program: Program, objective: Objective, *, repeats: int = 1
) -> tuple[Any, Any, Any]:
    """State, base and batch of a training step: random weights and tokens, no padding; its rows again and again."""
    model, optimizer = objective.model, build_optimizer(config.optimizer, 1000)
    decoder_shardings = model.shardings["decoder"] if objective.has_scalar_head else model.shardings
    # The trunk of a scalar model has no language head.
    shape = dataclasses.replace(model.config, tie_embeddings=model.config.tie_embeddings or objective.has_scalar_head)
    params = build.init_params(shape, config.model, jax.random.key(0), decoder_shardings)
    if objective.has_scalar_head:
        head = build.init_scalar_head(shape, jax.random.key(2), model.shardings["scalar_head"])
        params = heads.from_decoder_params(params, head)
    abstract_state, _, abstract_batch = program.arguments
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state)
    start = jax.jit(lambda p, k: create(p, optimizer, k), out_shardings=shardings, donate_argnums=0)
    rng = np.random.default_rng(0)
    rows, length = abstract_batch.tokens.shape
    tokens = np.tile(rng.integers(0, shape.vocab_size, (rows // repeats, length)).astype(np.int32), (repeats, 1))
    batch = (_comparisons if objective.has_scalar_head else _texts)(tokens)
    return start(params, jax.random.key(1)), {}, jax.device_put(batch, abstract_batch.tokens.sharding)


def _texts(tokens: np.ndarray) -> TokenBatch:
    """Rows of one text each, all of it trained on."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return TokenBatch(tokens, np.ones_like(tokens), positions, np.ones(tokens.shape, bool))


def _comparisons(tokens: np.ndarray) -> ComparisonBatch:
    """Rows of one pair each, both sides equally long."""
    half = tokens.shape[1] // 2
    column = np.arange(tokens.shape[1], dtype=np.int32)
    segments, positions, ends = 1 + column // half, column % half, column == half - 1
    columns = (np.broadcast_to(x, tokens.shape) for x in (segments, positions, ends, half * ends.astype(np.int32)))
    return ComparisonBatch(tokens, *columns)


class Steps:
    """Steps on one batch, again and again; each takes the memory of the state before it."""

    def __init__(self, step: Any, state: Any, base: Any, batch: Any) -> None:
        self._step, self._state, self._rest = step, state, (base, batch)
        self.losses: list[jax.Array] = []

    def __call__(self) -> Any:
        self._state, metrics = self._step(self._state, *self._rest)
        self.losses.append(metrics["loss"])
        return metrics


def _train(config: TrainingConfig, shape: Shape, report: Report) -> None:
    topology = here.topology()
    for model in shape.models:
        sized = with_sizes(config, model, shape, num_devices=len(topology.devices))
        if _measure(sized, topology, shape, report):
            return
    raise LeftOutError(f"none of {', '.join(shape.models)} fits")


def _measure(config: TrainingConfig, topology: Topology, shape: Shape, report: Report) -> bool:
    """Measure one model; False where it does not fit."""
    name = config.model.preset
    mesh = build_mesh(config.mesh, topology.devices)
    stage = stage_programs(config, mesh)
    (program,) = stage.programs
    if topology.chip is not None:
        needed = here.least_bytes(stage.residents, stage.residents["state"].params)
        if needed > topology.chip.memory * GIB:
            here.report_misfit(report, f"{name}, all weights,", needed, topology.chip)
            return False
    report.doing(f"compile a step of {name}")
    plan = here.plan(config, topology, report)
    if topology.chip is not None and plan is not None and not plan.fits:
        here.report_misfit(report, f"{name}, all weights,", plan.programs[0].fullest, topology.chip)
        return False
    report.doing(f"draw the weights of {name}")
    objective = build_objective(config, sharded_model.shard_model(config.model, mesh))
    step = Steps(program.jitted, *first_arguments(config, program, objective))
    report.doing(f"steps of {name}")
    seconds = here.best_seconds(step, rounds=shape.rounds)
    first, last = float(step.losses[0]), float(step.losses[-1])
    rows, length = config.data.batch_size, config.data.max_length
    text = length // 2 if objective.has_scalar_head else length  # tokens that see each other
    flops = training_flops_per_token(objective.model.config, text, scalar_head=objective.has_scalar_head)
    share = mfu(flops * rows * length, seconds, topology.devices, "bfloat16")
    report.row(
        f"{name}, {rows} × {length} tokens{here.devices_text()}",
        rows * length / seconds,
        "tokens/s",
        beside=f"{seconds:.3g} s a step, loss {first:.3f} to {last:.3f}",
        passed=None if np.isfinite(last) else False,
    )
    report.row("MFU by hand count", share, beside="" if share else "the peak of this device is unknown")
    here.report_memory(report, plan)
    if plan is not None:
        report.row("compiled in", plan.programs[0].compile_seconds, "s")
    return True
