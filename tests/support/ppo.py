"""A small PPO run in memory: a learner with parameters, prompts, a verifiable reward, and the loop around them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm.algorithms import scoring
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.inference import parameters, sharded_model
from jaxrm.models import heads, lora
from jaxrm.models.build import ModelSource
from jaxrm.models.config import PRESETS
from jaxrm.models.lora import NO_LORA
from jaxrm.models.sampling import SamplingConfig
from jaxrm.ops import reward_scaling, token_rewards
from jaxrm.ops.reward_kinds import KINDS
from jaxrm.runtime.checkpoint import CheckpointConfig, Checkpoints
from jaxrm.runtime.preemption import StopRequest
from jaxrm.sharding import partition
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import PPO
from jaxrm.stages.inputs.prompts import PlacedPrompts
from jaxrm.stages.ppo.critic import zero_head
from jaxrm.stages.ppo.data import PPOData
from jaxrm.stages.ppo.learner import open_learner
from jaxrm.stages.ppo.loop import PPORun
from jaxrm.stages.ppo.loop import fit as train
from jaxrm.types import ResponseBatch, TokenBatch

SMALL = dataclasses.replace(
    PRESETS["tiny"], vocab_size=16, hidden_size=32, intermediate_size=64, num_layers=2, head_dim=8
)
EOS, B, P, T = 1, 8, 5, 6
ONE, EIGHT = MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)
KEY = jax.random.key(0)


def experiment(
    *,
    temperature=1.0,
    num_steps=None,
    batch_size=B,
    new_tokens=T,
    lr=3e-3,
    parts=1,
    ptx=None,
    rollout_model=None,
    n=1,
    rollout=None,
    **options,
):
    sampling = SamplingConfig(max_new_tokens=new_tokens, temperature=temperature)
    return PPO(
        model=ModelSource(preset="tiny"),
        num_steps=num_steps,
        num_microbatches=parts,
        data=DataConfig(path="task:safety", batch_size=batch_size, max_length=P + new_tokens),
        optimizer=OptimizerConfig(lr=lr, schedule="constant", warmup=0.0),
        critic=CriticConfig(optimizer=OptimizerConfig(lr=3 * lr, schedule="constant", warmup=0.0)),
        rollout=RolloutConfig(sampling=sampling, mesh=rollout_model, responses_per_prompt=n, **(rollout or {})),
        reward=RewardConfig(kind="scalar", function="task:safety"),
        ppo=PPOConfig(**options),
        ptx=ptx,
    )


class Setup:
    """A small learner with parameters, on one device or eight."""

    def __init__(self, config, mesh_config=ONE, reward=None, shape=SMALL, adapters=NO_LORA):
        self.config = config
        mesh = build_mesh(mesh_config, jax.devices()[: math.prod(dataclasses.astuple(mesh_config))])
        self.decoder = sharded_model.shard_model(config.model, mesh, shape, lora=adapters)
        critic = None
        if config.ppo.has_values and not config.ppo.shared_trunk:
            critic = sharded_model.shard_scalar_model(config.model, mesh, shape, lora=adapters)
        self.learner = open_learner(
            config, mesh, self.decoder, critic, num_steps=config.num_steps or 100, end_ids=(EOS,)
        )
        self.networks, self.mesh = self.learner.networks, mesh
        self.programs = self.learner.programs(reward or (lambda *_: None))
        self.reference, self.base = lora.split(self.params(0))
        self.state = self.init_state()

    def params(self, seed):
        """Of a decoder; adapters stand on one base whatever the seed."""
        return parameters.init_params(self.decoder, jax.random.key(seed), seed=0)

    def init_state(self, seed=0):
        policy, critic = self.params(seed), None
        if self.config.ppo.shared_trunk:
            policy = {"decoder": policy, "scalar_head": zero_head(self.learner.policy)}
        if self.learner.critic is not None:
            critic = heads.from_decoder_params(self.params(seed + 1), zero_head(self.learner.critic))
        return self.learner.init_state(lora.split(policy)[0], lora.split(critic)[0], KEY)

    def log_probs(self, batch, state=None):
        state = state or self.state
        critic = None if state.critic is None else state.critic.params
        return self.programs.log_probs(self.base, state.policy.params, critic, self.reference, batch)


@functools.cache
def separate(temperature=1.0):
    return Setup(experiment(temperature=temperature))


@functools.cache
def rows_of_16():
    """What several tests take whole steps with; each starts from its own `Setup.init_state`."""
    return Setup(experiment(batch_size=16, lr=1e-3))


def batch_of(seed=0, *, rows=B, width=P, length=T, fill=EOS):
    """Prompts and responses of unequal lengths; what stands outside the masks is the id of EOS, or ``fill``."""
    rng = np.random.default_rng(seed)
    prompts, prompt_mask = np.full((rows, width), fill), np.zeros((rows, width), bool)
    responses, mask = np.full((rows, length), fill), np.zeros((rows, length), bool)
    for row in range(rows):
        p, t = 2 + row % (P - 1), 1 + row % T
        prompts[row, width - p :], prompt_mask[row, width - p :] = rng.integers(2, 16, p), True
        drawn = rng.integers(2, 16, t)
        drawn[-1] = EOS if row % 2 else drawn[-1]
        responses[row, :t], mask[row, :t] = drawn, True
    return ResponseBatch(
        jnp.asarray(prompts, jnp.int32), jnp.asarray(prompt_mask), jnp.asarray(responses, jnp.int32), jnp.asarray(mask)
    )


def stay(calibration, rewards):
    """The calibration of a source whose center does not move."""
    del rewards
    return calibration


def rewarded(batch, scores):
    """Token rewards of ``scores [B]`` as a scalar reward model gives them."""
    values = token_rewards.scalar(jnp.asarray(scores, jnp.float32), batch.response_mask)
    return scoring.as_token_rewards(
        reward_scaling.uncalibrated(), KINDS["scalar"], values, batch.response_mask, batch, (EOS,)
    )


class Rows:
    """Batches of prompts without end, whose position can be saved."""

    def __init__(self, config, mesh):
        self.config, self.mesh, self.at = config, mesh, 0

    def __next__(self):
        self.at += 1
        return self.at

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]

    def place(self, number):
        prompts = self.config.data.batch_size // self.config.rollout.responses_per_prompt
        tokens = np.random.default_rng(number % 2).integers(2, 16, (prompts, P)).astype(np.int32)
        mask = np.ones(tokens.shape, bool)
        mask[::3, :2] = False
        rows = jax.NamedSharding(self.mesh, jax.P(("data", "fsdp")))
        return PlacedPrompts(jax.device_put(tokens, rows), jax.device_put(mask, rows))


def ptx_rows(rows=4):
    """Rows of SFT data of unequal lengths."""
    rng = np.random.default_rng(2)
    real = np.arange(9)[None] < np.resize([9, 6, 4, 8], rows)[:, None]
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (rows, 9))
    arrays = rng.integers(2, 16, (rows, 9)).astype(np.int32), real.astype(np.int32), positions, real & (positions > 2)
    return TokenBatch(*map(jnp.asarray, arrays))


class RecordedMetrics:
    """A reporter that keeps what it gets."""

    def __init__(self):
        self.steps, self.evaluations = [], []

    def step(self, step, metrics):
        self.steps.append(metrics)

    def evaluation(self, step, metrics):
        self.evaluations.append((step, metrics))


@functools.partial(jax.jit, static_argnames="at_end")
def pattern_reward(calibration, batch, reference_log_probs, *, at_end=False):
    """Verifiable: a quarter for each of the first tokens that is that of 5, 9, 9, 9; on the token, or ``at_end``."""
    wanted = jnp.asarray([5, 9, 9, 9], jnp.int32)
    right = (batch.responses[:, :4] == wanted[None]) & batch.response_mask[:, :4]
    values = jnp.pad(0.25 * right, ((0, 0), (0, batch.responses.shape[1] - 4)))
    if at_end:
        values = token_rewards.scalar(values.sum(axis=1), batch.response_mask)
    return scoring.as_token_rewards(calibration, KINDS["margin"], values, batch.response_mask, batch, (EOS,))


def data_of(rows, fingerprint="these", ptx=None):
    to_devices = None if ptx is None else lambda _: jax.device_put(ptx, partition.batch_sharding(rows.mesh))
    return PPOData(rows, rows.place, fingerprint, None if ptx is None else Rows(rows.config, rows.mesh), to_devices)


def fit(
    s,
    folder,
    *,
    num_steps,
    stop=None,
    every=1000,
    reward=None,
    state=None,
    rows=None,
    evaluate=None,
    owed=False,
    eval_every=1000,
    ptx=None,
):
    recorded, rows = RecordedMetrics(), rows or Rows(s.config, s.mesh)
    checkpoints = Checkpoints(folder, CheckpointConfig(every=every))
    evaluation = JudgedEvaluationConfig(every=eval_every)
    config = dataclasses.replace(s.config, evaluation=evaluation, checkpoint=CheckpointConfig(every=every))
    run = PPORun(
        learner=dataclasses.replace(s.learner, config=config, num_steps=num_steps),
        programs=s.programs if reward is None else dataclasses.replace(s.programs, scoring=reward),
        base=s.base,
        reference_params=s.reference,
        data=data_of(rows, ptx=ptx),
        evaluate=evaluate or (lambda step, state: {"eval_reward": float(step)}),
        checkpoints=checkpoints,
        reporter=recorded,
        stop=stop or StopRequest(),
    )
    state, finished = train(run, state or s.init_state(), KEY, evaluation_pending=owed)
    return state, finished, recorded, checkpoints
