"""Every config in configs/ builds, fits a mesh, and is described; large models cost nothing to check."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import pytest

from jaxrm.algorithms.optimizer import build_optimizer
from jaxrm.algorithms.ppo_state import PPOBatch
from jaxrm.algorithms.reward_config import sources_of
from jaxrm.algorithms.scoring import as_token_rewards
from jaxrm.algorithms.state import create
from jaxrm.algorithms.summed_rewards import sum_rewards
from jaxrm.config.files import load_config_file
from jaxrm.inference.sharded_model import shard_model, shard_scalar_model
from jaxrm.models import lora
from jaxrm.models.config import preset
from jaxrm.models.sampling import check_on_policy
from jaxrm.ops.reward_kinds import KINDS
from jaxrm.pipeline.config import resolve
from jaxrm.sharding.mesh import MeshConfig, build_mesh, check_batch
from jaxrm.stage_config import STAGES, StageConfig
from jaxrm.stages.objective import build_objective
from jaxrm.stages.ppo.learner import open_learner
from jaxrm.study import config as study
from jaxrm.train import CONFIG_CLASSES
from jaxrm.types import TokenBatch

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.py"))
SHAPES = {
    "gemma_2b": "gemma-2b",
    "llama_2_7b": "llama-2-7b",
    "smollm2_135m": "smollm2-135m",
    "quickstart": "tiny",
    "study": "lab-tiny",
    "_tiny": "tiny",
}
COLUMNS = dict.fromkeys(("loss_mask", "is_edit", "is_correction", "is_chosen_end"), "bool")  # the others are int32
COLUMNS |= {"reference_chosen": "float32", "reference_rejected": "float32"}
UNTRAINED = [row.name for row in STAGES.values() if not row.is_planned]


def stages_of(path):
    """Every stage that a config describes, by name; one that describes a single stage has it under its own."""
    config, _ = load_config_file(str(path), CONFIG_CLASSES)
    if isinstance(config, StageConfig):
        return {path.stem: config}
    if isinstance(config, study.Study):
        stages = (getattr(config, field.name) for field in dataclasses.fields(config))
        return {stage.algorithm: stage for stage in stages if isinstance(stage, StageConfig)}
    return {name: stage.experiment for name, stage in resolve(config).items()}


def described(path):
    return stages_of(path)[path.stem]


TRAINED = [
    pytest.param(path, name, id=path.stem if name == path.stem else f"{path.stem}-{name}")
    for path in CONFIGS
    for name, stage in stages_of(path).items()
    if stage.algorithm not in UNTRAINED
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "stage"), TRAINED)
def test_a_step_of_the_config_builds_on_eight_devices(path, stage):
    """Abstractly: shapes and shardings of the state, and the trace of loss and gradients."""
    config = stages_of(path)[stage]
    name = next(name for stem, name in SHAPES.items() if stem in path.stem)
    mesh = mesh_of(path, config)
    check_batch(mesh, "data.batch_size", config.data.batch_size, config.num_microbatches)
    source = dataclasses.replace(config.model, path=None, preset=name)
    if config.algorithm == "ppo":
        check_a_step_of_ppo(dataclasses.replace(config, model=source), preset(name), mesh)
        return
    config = dataclasses.replace(config, model=source)
    objective = build_objective(config, shard_model(source, mesh, preset(name), lora=config.lora))
    model, loss_fn, batch_type = objective.model, objective.loss_fn, objective.batch_type
    optimizer = build_optimizer(config.optimizer, 100)
    state = jax.eval_shape(lambda p: create(p, optimizer, jax.random.key(0)), model.trained_shapes)

    rows = (config.data.batch_size, config.data.max_length)
    names = [field.name for field in dataclasses.fields(batch_type)]
    batch = batch_type(**{name: jax.ShapeDtypeStruct(rows, COLUMNS.get(name, "int32")) for name in names})

    def gradients(params, frozen, batch):
        return jax.grad(lambda p: loss_fn(lora.join(frozen, p), batch, jax.random.key(0))[0][0])(params)

    grads = jax.eval_shape(gradients, state.params, model.frozen_shapes, batch)
    assert jax.tree.map(lambda x: x.shape, grads) == jax.tree.map(lambda x: x.shape, state.params)
    counted = sum(math.prod(x.shape) for x in jax.tree.leaves(model.shapes))
    if config.lora.is_on:
        counted -= sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
        counted += preset(name).hidden_size if config.algorithm == "scalar_rm" else 0  # the head, which is trained too
    known = {"gemma-2b": 2_506_172_416, "llama-2-7b": 6_738_415_616}.get(name)
    if known is not None and config.algorithm == "scalar_rm":  # a head of D in place of Llama's [V, D]
        known += preset(name).hidden_size - (0 if preset(name).tie_embeddings else 32_000 * 4096)
    assert known in (None, counted)


def mesh_of(path, config):
    """Eight devices; one for a study, which runs many small things, and as many as a step has prompts at most."""
    devices = 1 if path.stem == "study" else 8
    if config.algorithm == "ppo":
        devices = math.gcd(devices, config.data.batch_size // config.rollout.responses_per_prompt)
    return build_mesh(MeshConfig(math.gcd(devices, 2), max(devices // 2, 1)), jax.devices()[:devices])


def check_a_step_of_ppo(config, shape, mesh):
    """Rollout, log-probs, advantages and both updates, abstractly, with whatever the config asks for."""
    decoder, critic = shard_model(config.model, mesh, shape, lora=config.lora), None
    if config.ppo.has_values:
        critic = shard_scalar_model(config.model, mesh, shape, lora=config.lora)
    learner = open_learner(config, mesh, decoder, critic, num_steps=10, end_ids=(1,))
    programs, state = learner.programs(lambda *_: None), learner.abstract
    B, T = config.data.batch_size, config.rollout.sampling.max_new_tokens
    check_on_policy(config.rollout.sampling, "config.rollout.sampling")
    P = config.data.max_length - T
    assert P >= T // 2 and config.data.max_length <= shape.max_position
    prompts, mask = (
        jax.ShapeDtypeStruct((B // config.rollout.responses_per_prompt, P), dtype) for dtype in ("int32", "bool")
    )
    batch, _ = jax.eval_shape(programs.rollout, decoder.shapes, prompts, mask, jax.random.key(0))
    assert batch.responses.shape == (B, T)
    trained = (state.policy.params, state.critic and state.critic.params, decoder.trained_shapes)
    log_probs = jax.eval_shape(programs.log_probs, decoder.frozen_shapes, *trained, batch)
    score = functools.partial(as_token_rewards, end_ids=(1,))
    values, tags = (jax.ShapeDtypeStruct((B, T), dtype) for dtype in ("float32", "bool"))
    sources = sources_of(config)

    def summed(calibration, values, tags, batch):
        parts = {
            name: score(calibration[name] if config.rewards else calibration, KINDS[each.kind], values, tags, batch)
            for name, each in sources.items()
        }
        if not config.rewards:
            return parts["reward"]
        return sum_rewards(parts, batch, weights={name: each.weight for name, each in sources.items()}, end_ids=(1,))

    rewards = jax.eval_shape(summed, state.initial_calibration, values, tags, batch)
    rollout, _, _ = jax.eval_shape(programs.estimate, state.feedback, batch, log_probs, rewards)
    update = PPOBatch(rollout)
    if config.ptx is not None:
        rows = (config.ptx.batch_size, config.ptx.max_length)
        names = [field.name for field in dataclasses.fields(TokenBatch)]
        ptx = TokenBatch(**{name: jax.ShapeDtypeStruct(rows, COLUMNS.get(name, "int32")) for name in names})
        update = jax.eval_shape(programs.weigh, rollout, ptx)
    frozen = learner.networks.frozen(decoder.frozen_shapes)
    policy, _ = jax.eval_shape(programs.update_policy, state.policy, frozen.policy, update)
    pairs = [(policy, state.policy)]
    if critic is not None:
        critic_state, _ = jax.eval_shape(programs.update_critic, state.critic, frozen.critic, PPOBatch(rollout))
        pairs.append((critic_state, state.critic))
    for after, before in pairs:
        assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, before)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem.startswith("rm_")], ids=lambda path: path.stem)
def test_a_scalar_kind_goes_with_a_scalar_reward_model(path):
    config = described(path)
    assert (config.reward.kind == "scalar") == (config.algorithm == "scalar_rm")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_how_to_run_it(path):
    _, docstring = load_config_file(str(path), CONFIG_CLASSES)
    assert f"python -m jaxrm.train --config=configs/{path.name}" in docstring and "Needs:" in docstring
