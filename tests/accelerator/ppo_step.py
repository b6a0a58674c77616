"""A PPO step by phase: policy, critic, reference and seq2seq reward model of one shape, all with random weights.

The planner says first whether it fits; of several ways the first that does is measured.
"""

from typing import Any

import jax
import numpy as np
from accelerator import here
from accelerator.report import LeftOutError, Report
from accelerator.shapes import Answers, Shape
from benchmarks.ppo import Prompts, RecordedMetrics

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.inference import sharded_model
from jaxrm.inference.sharded_model import ShardedModel, in_compute_dtype
from jaxrm.models import build, heads, lora
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import LoRAConfig
from jaxrm.models.sampling import SamplingConfig
from jaxrm.planning.abstract import StagePrograms
from jaxrm.planning.cost import StagePlan
from jaxrm.planning.programs import stage_programs
from jaxrm.planning.topology import GIB, Topology
from jaxrm.runtime.metrics import PHASES
from jaxrm.runtime.preemption import StopRequest
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.sharding.partition import batch_sharding
from jaxrm.stage_config import PPO
from jaxrm.stages.inputs.prompts import PlacedPrompts
from jaxrm.stages.ppo.critic import zero_head
from jaxrm.stages.ppo.data import PPOData
from jaxrm.stages.ppo.learner import Learner, open_learner
from jaxrm.stages.ppo.loop import PPORun, fit

STEPS = 3  # the first compiles; the quickest of the others counts
END = 0  # an id that random weights draw seldom, so that responses reach their limit


def all_weights(shape: Shape, report: Report) -> None:
    """All weights of policy and critic are trained; where two trunks do not fit, both stand on one."""
    ways = {"critic of its own": PPOConfig(), "one trunk for policy and critic": PPOConfig(shared_trunk=True)}
    candidates = {
        f"{name}, {way}": _config(name, shape.ppo, shape.ppo_microbatches, ppo=options)
        for name in shape.models
        for way, options in ways.items()
    }
    _measure_first_that_fits(candidates, report)


def adapters(shape: Shape, report: Report) -> None:
    """Adapters of rank 16 on one frozen base."""
    adapter = LoRAConfig(rank=16, alpha=32.0)
    parts = shape.lora_microbatches
    candidates = {
        f"{name}, adapters": _config(name, shape.lora, parts, lora=adapter, rollout_microbatches=parts)
        for name in shape.adapted
    }
    _measure_first_that_fits(candidates, report)


def _config(
    model: str, sizes: Answers, num_microbatches: int, *, rollout_microbatches: int = 1, **sections: Any
) -> PPO:
    optimizer = OptimizerConfig(lr=1e-6)
    return PPO(
        model=ModelSource(preset=model, dtype="bfloat16"),
        num_steps=STEPS,
        num_microbatches=num_microbatches,
        data=DataConfig(
            path="task:safety",
            batch_size=sizes.rows * jax.device_count(),
            max_length=sizes.prompt + sizes.response,
        ),
        rollout=RolloutConfig(
            sampling=SamplingConfig(max_new_tokens=sizes.response), num_microbatches=rollout_microbatches
        ),
        reward=RewardConfig(kind="literal", model="runs/random_weights"),
        critic=CriticConfig(optimizer=optimizer),
        optimizer=optimizer,
        evaluation=JudgedEvaluationConfig(every=10**9),
        mesh=MeshConfig(data=1, fsdp=-1),
        **sections,
    )


def _measure_first_that_fits(candidates: dict[str, PPO], report: Report) -> None:
    topology = here.topology()
    for name, config in candidates.items():
        stage = stage_programs(config, build_mesh(config.mesh, topology.devices))
        if topology.chip is not None:
            needed = here.least_bytes(stage.residents, _trained_at_once(stage))
            if needed > topology.chip.memory * GIB:
                here.report_misfit(report, name, needed, topology.chip)
                continue
        report.doing(f"compile {len(stage.programs)} programs: {name}")
        plan = here.plan(config, topology, report)
        if topology.chip is not None and plan is not None and not plan.fits:
            here.report_misfit(report, name, plan.programs[-1].fullest, topology.chip)
            continue
        _measure(name, config, topology, stage, plan, report)
        return
    raise LeftOutError("none of these fits")


def _trained_at_once(stage: StagePrograms) -> Any:
    """Parameters whose gradients are there together: of policy and critic in one pass, else of the policy."""
    is_one_pass = any(program.name == "update" for program in stage.programs)
    states = [stage.residents[name] for name in ("policy", "critic") if name in stage.residents]
    return [state.params for state in (states if is_one_pass else states[:1])]


def _measure(
    name: str, config: PPO, topology: Topology, stage: StagePrograms, plan: StagePlan | None, report: Report
) -> None:
    report.doing(f"draw the weights: {name}")
    run, state = _open_run(config, topology, stage)
    report.doing(f"{STEPS} steps: {name}")
    fit(run, state, jax.random.key(0))
    best = min(run.reporter.rows[1:], key=lambda row: row["step_seconds"])
    rows, sizes = config.data.batch_size, config.rollout.sampling
    prompt = config.data.max_length - sizes.max_new_tokens
    report.row(
        f"{name}, {rows} × ({prompt} + {sizes.max_new_tokens}) tokens{here.devices_text()}",
        best["step_seconds"],
        "s a step",
        beside=f"{best['tokens_per_second']:,.0f} response tokens/s; {_by_planner(plan, topology)}",
    )
    for phase in PHASES:
        rate = best[f"{phase}_tokens_per_second"]
        report.row(phase, best[f"{phase}_seconds"], "s", beside=f"{rate:,.0f} tokens/s")
    here.report_memory(report, plan)
    if plan is not None:
        report.row("compiled in", sum(program.compile_seconds for program in plan.programs), "s")


def _by_planner(plan: StagePlan | None, topology: Topology) -> str:
    seconds = None if plan is None else plan.seconds
    if len(topology.devices) > 1 or seconds is None or not np.isfinite(seconds).all():
        return "the planner knows no speeds of these devices"
    return f"planner {seconds[0]:.3g} to {seconds[1]:.3g} s"


class _NoCheckpoints:
    """In place of `jaxrm.runtime.checkpoint.Checkpoints`: every step is there already, so none is written."""

    def steps(self) -> range:
        return range(STEPS + 1)

    def wait(self) -> None:
        pass


def _open_run(config: PPO, topology: Topology, stage: StagePrograms) -> tuple[PPORun, Any]:
    """A run and its first state."""
    mesh = build_mesh(config.mesh, topology.devices)
    decoder = sharded_model.shard_model(config.model, mesh, lora=config.lora)
    critic = None
    if not config.ppo.shared_trunk:
        critic = sharded_model.shard_scalar_model(config.model, mesh, lora=config.lora)
    learner = open_learner(config, mesh, decoder, critic, num_steps=STEPS, end_ids=(END,))
    base = {}
    if config.lora.is_on:
        plain = sharded_model.shard_model(config.model, mesh)
        base = in_compute_dtype(_draw(plain, 9), config.model.dtype)
    reference, scorer = (_read_only(decoder, seed) for seed in (0, 1))
    (scoring,) = (program for program in stage.programs if program.name == "scoring")
    whole = lora.join(base, scorer)
    programs = learner.programs(lambda calibration, batch, _: scoring.jitted(whole, calibration, batch, None))
    sampling = config.rollout.sampling
    shape = (config.data.batch_size, config.data.max_length - sampling.max_new_tokens)
    ids = np.random.default_rng(0).integers(1, decoder.config.vocab_size, shape).astype(np.int32)
    rows = batch_sharding(learner.rollout_model.mesh)
    run = PPORun(
        learner=learner,
        programs=programs,
        base=base,
        reference_params=reference,
        data=PPOData(
            Prompts(ids), lambda ids: jax.device_put(PlacedPrompts(ids, np.ones(ids.shape, bool)), rows), fingerprint=""
        ),
        evaluate=lambda *_: {"eval_reward": 0.0},
        checkpoints=_NoCheckpoints(),
        reporter=RecordedMetrics(),
        stop=StopRequest(),
    )
    return run, _first_state(learner)


def _first_state(learner: Learner) -> Any:
    policy, critic = _trained(learner.decoder, 2), None
    if learner.config.ppo.shared_trunk:
        policy = {"decoder": policy, "scalar_head": zero_head(learner.policy)}
    if learner.critic is not None:
        critic = heads.from_decoder_params(_trained(learner.decoder, 3), zero_head(learner.critic))
    return learner.init_state(policy, critic, jax.random.key(0))


def _trained(model: ShardedModel, seed: int) -> Any:
    """What is trained of a decoder: its adapters, or all of it."""
    if model.lora.is_on:
        return lora.init_adapters(model.trained_shapes, jax.random.key(seed), model.trained_shardings)
    return _draw(model, seed)


def _read_only(model: ShardedModel, seed: int) -> Any:
    """The same of a model that is never trained."""
    return in_compute_dtype(_trained(model, seed), model.source.dtype)


def _draw(model: ShardedModel, seed: int) -> Any:
    return build.init_params(model.config, model.source, jax.random.key(seed), model.shardings)
