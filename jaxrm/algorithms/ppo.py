"""PPO with a reward at every token.

One step, from top to bottom of this file (`fit`): the policy answers prompts; policy, reference, critic and reward
source read the answers; token rewards, less a KL penalty, become advantages (`estimate`); policy and critic are
updated on them (`update`); then the step is told, now and then evaluated and saved.

    R_t = clamp(r_t - beta (log pi_old(y_t) - log pi_ref(y_t)), -c, c)
    A_t = sum_l (gamma lambda)^l delta_{t+l},   delta_t = R_t + gamma V_{t+1} - V_t,   G_t = A_t + V_t
    L_pi = - mean min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)
    L_V = 1/2 mean max((V_t - G_t)^2, (clip(V_t, V_old,t - eps_v, V_old,t + eps_v) - G_t)^2)

Which reward model stands behind r_t cannot be told here: a scalar one differs in r_t alone. What is saved is a function
of the step alone, so a run that was killed and started again ends with the same bits as one that was not.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm.algorithms.ppo_config import PPOConfig
from jaxrm.algorithms.ppo_state import PPOBatch, PPOState, RewardAndKLState, saved_arrays, steps_of
from jaxrm.algorithms.rollout import Networks, Respond, RewardSource, TokenLogProbs
from jaxrm.algorithms.state import TrainState
from jaxrm.algorithms.train_step import Metrics
from jaxrm.data.loader import BatchIterator
from jaxrm.errors import UserError, flag
from jaxrm.ops import advantages, kl, masking, reward_scaling
from jaxrm.ops.token_rewards import Kind
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.preemption import StopRequest, agree
from jaxrm.types import ResponseBatch, Rollout, TokenBatch, TokenRewards


def estimate(
    feedback: RewardAndKLState,
    batch: ResponseBatch,
    readings: TokenLogProbs,
    rewards: TokenRewards,
    *,
    config: PPOConfig,
    kind: Kind,
    center_momentum: float | None,
) -> tuple[Rollout, RewardAndKLState, Metrics]:
    """From token rewards to advantages, and to the feedback of the next step.

    Args:
      feedback: of this step.
      batch: the responses.
      readings: of the models.
      rewards: of the reward source.
      config: options of PPO.
      kind: of token reward.
      center_momentum: of a running centre; None where the centre stays.
    """
    mask = batch.response_mask
    shaped = rewards.rewards
    if config.normalize_rewards:
        mean = masking.masked_mean(shaped, mask)
        shaped = shaped * jax.lax.rsqrt(masking.masked_mean(jnp.square(shaped - mean), mask) + 1e-8)
    cut_off = rewards.diagnostics["ended"] == 0
    shaped -= config.missing_end_penalty * (masking.last_token(mask) & cut_off[:, None])
    penalized = kl.penalized_rewards(
        shaped,
        readings.log_probs,
        readings.reference_log_probs,
        mask,
        coefficient=feedback.kl_coef,
        limit=config.reward_clip,
        estimator=config.kl_estimator,
    )
    advantage, returns = advantages.gae(
        penalized, readings.values, mask, discount=config.discount, gae_lambda=config.gae_lambda
    )
    explained = advantages.explained_variance(readings.values, returns, mask)
    deviation = jnp.sqrt(masking.masked_mean(jnp.square(advantage - masking.masked_mean(advantage, mask)), mask))
    if config.whiten_advantages:
        advantage = masking.masked_whiten(advantage, mask)

    log_ratio = kl.kl_estimate("k1", readings.log_probs, readings.reference_log_probs)
    responses = jnp.any(mask, axis=1)  # a response without a token says nothing
    kl_of_each = masking.masked_sum(log_ratio, mask, axis=1)
    kl_of_response = masking.masked_mean(kl_of_each, responses)
    spread = masking.masked_mean(jnp.square(kl_of_each - kl_of_response), responses)
    metrics = {
        "reward": masking.masked_mean(rewards.diagnostics["sum"], responses),
        "reward_uncalibrated": masking.masked_mean(masking.masked_sum(rewards.values, mask, axis=1), responses),
        "return": masking.masked_mean(masking.masked_sum(penalized, mask, axis=1), responses),
        "kl": kl_of_response,
        "kl_error": jnp.sqrt(spread / jnp.maximum(jnp.sum(responses), 1)),
        "kl_per_token": masking.masked_mean(log_ratio, mask),
        "kl_coef": feedback.kl_coef,
        "center": feedback.calibration.center,
        "value": masking.masked_mean(readings.values, mask),
        "explained_variance": explained,
        "advantage_std": deviation,
        "response_length": masking.masked_mean(rewards.diagnostics["length"], responses),
        "tokens": jnp.sum(mask, dtype=jnp.float32),
        "prompt_tokens": jnp.sum(batch.prompt_mask, dtype=jnp.float32),
    }
    for name in ("ended", "tag_rate", "divergence", "end_tag"):
        metrics[name] = masking.masked_mean(rewards.diagnostics[name], responses)

    calibration, kl_coef = feedback.calibration, feedback.kl_coef
    if center_momentum is not None:
        calibration = reward_scaling.update_center(calibration, kind, rewards.values, mask, momentum=center_momentum)
    if config.kl_target is not None:
        kl_coef = kl.next_coefficient(
            kl_coef,
            kl_of_response,
            target=config.kl_target,
            horizon=config.kl_horizon,
            count=jnp.sum(responses),
        )
    rollout = Rollout(batch, readings.log_probs, readings.reference_log_probs, readings.values, advantage, returns)
    return rollout, RewardAndKLState(calibration, kl_coef), metrics


def minibatch(rollout: Rollout, key: jax.Array, part: jax.Array, *, parts: int) -> Rollout:
    """The ``part``-th of ``parts`` shares of the responses, in an order drawn with ``key``."""
    rows = rollout.log_probs.shape[0]
    chosen = jax.random.permutation(key, rows).reshape(parts, rows // parts)[part]
    return jax.tree.map(lambda x: x[chosen], rollout)


def weigh(rollout: Rollout, ptx: TokenBatch) -> PPOBatch:
    """A rollout and rows of SFT data as one batch (see `PPOBatch`)."""
    response_tokens = jnp.sum(rollout.responses.response_mask, dtype=jnp.float32)
    weight = response_tokens / jnp.maximum(jnp.sum(ptx.loss_mask, dtype=jnp.float32), 1.0)
    return PPOBatch(rollout, ptx, jnp.full((ptx.tokens.shape[0],), weight))


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted parts of a step.

    Attributes:
      respond: how the policy answers.
      read: from `jaxrm.algorithms.rollout.build_log_probs`.
      reward: source of token rewards.
      estimate: `estimate`.
      minibatch: `minibatch`.
      weigh: `weigh`.
      update_policy: on a `PPOBatch`; the state is donated.
      update_critic: the same for the critic; never called where the trunk is shared.
    """

    respond: Respond
    read: Callable[..., TokenLogProbs]
    reward: RewardSource
    estimate: Callable[..., tuple[Rollout, RewardAndKLState, Metrics]]
    minibatch: Callable[..., Rollout]
    weigh: Callable[..., PPOBatch]
    update_policy: Callable[[TrainState, PPOBatch], tuple[TrainState, Metrics]]
    update_critic: Callable[[TrainState, PPOBatch], tuple[TrainState, Metrics]]


def update(
    programs: Programs,
    state: PPOState,
    rollout: Rollout,
    key: jax.Array,
    config: PPOConfig,
    next_ptx: Callable[[], TokenBatch] | None,
) -> tuple[PPOState, list[Metrics]]:
    """Every epoch and minibatch of a rollout; returns the metrics of each update. ``state`` is donated."""
    policy, critic, rows = state.policy, state.critic, []
    for epoch in range(config.num_epochs):
        for part in range(config.num_minibatches):
            share = rollout
            if config.num_minibatches > 1:
                share = programs.minibatch(rollout, jax.random.fold_in(key, epoch), np.int32(part))
            batch = PPOBatch(share) if next_ptx is None else programs.weigh(share, next_ptx())
            policy, metrics = programs.update_policy(policy, batch)
            if critic is not None:
                critic, of_critic = programs.update_critic(critic, PPOBatch(share))
                metrics |= {name: of_critic[name] for name in ("value_loss", "value_clip_fraction")}
                metrics["critic_grad_norm"] = of_critic["grad_norm"]
            rows.append(metrics)
    return dataclasses.replace(state, policy=policy, critic=critic), rows


class Reporter(Protocol):
    """Where a run tells what happens: console, files, dashboards."""

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of one step."""
        ...

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Held-out metrics after ``step`` steps."""
        ...


def fit(
    state: PPOState,
    *,
    config: PPOConfig,
    num_steps: int,
    networks: Networks,
    programs: Programs,
    reference_params: Any,
    prompts: BatchIterator,
    place: Callable[[dict[str, np.ndarray]], tuple[jax.Array, jax.Array]],
    ptx: BatchIterator | None,
    place_ptx: Callable[[dict[str, np.ndarray]], TokenBatch],
    data_fingerprint: str,
    evaluate: Callable[[int, PPOState], dict[str, float] | None],
    evaluation_owed: bool,
    eval_every: int,
    checkpoints: Checkpoints,
    checkpoint_every: int,
    reporter: Reporter,
    stop: StopRequest,
    key: jax.Array,
) -> tuple[PPOState, bool]:
    """Run PPO up to ``num_steps`` rollouts, or until asked to stop.

    Args:
      state: where to start; donated.
      config: options of PPO.
      num_steps: rollouts in all, those already made included.
      networks: what the state's parameters belong to.
      programs: the jitted parts of a step.
      reference_params: of the frozen SFT policy.
      prompts: batches of prompts, at the position that belongs to ``state``.
      place: puts a batch of prompts on the devices: tokens and mask ``[B, P]``, padded on the left.
      ptx: batches of SFT data, or None.
      place_ptx: puts one on the devices.
      data_fingerprint: of the prompts, the SFT data and the models, kept with every checkpoint.
      evaluate: held-out metrics after so many steps, among them ``eval_reward``; None where it was asked to stop.
      evaluation_owed: the run stopped before the evaluation that belongs to ``state``.
      eval_every: steps between evaluations; the first and last parameters are always evaluated.
      checkpoints: where to save.
      checkpoint_every: steps between checkpoints; the last one is always saved.
      reporter: told of every step and evaluation.
      stop: asked after every phase of a step.
      key: of the run; what a step draws is ``fold_in(key, step)``.

    Returns:
      The state, and whether it reached ``num_steps``.

    Raises:
      UserError: when a loss or a gradient is not finite; nothing of that step is saved.
    """
    step = steps_of(state, config)
    next_ptx = None if ptx is None else (lambda: place_ptx(next(ptx)))
    held_out_reward = None

    def save() -> None:
        loss = None if held_out_reward is None else -held_out_reward
        position = {"prompts": prompts.get_state(), "ptx": None if ptx is None else ptx.get_state()}
        if step not in checkpoints.steps():
            checkpoints.save(step, saved_arrays(state, networks), {**position, "data": data_fingerprint}, loss)

    def evaluated() -> bool:
        """Evaluate, unless asked to stop; a reward function may fail in it."""
        nonlocal held_out_reward
        try:
            held_out = evaluate(step, state)
        except UserError:
            save()
            checkpoints.wait()
            raise
        if held_out is None:
            return False
        reporter.evaluation(step, held_out)
        held_out_reward = held_out["eval_reward"]
        return True

    owed = (step == 0 or evaluation_owed) and not evaluated()
    while step < num_steps and not owed:
        clock = _Clock()
        step_key, order_key = jax.random.split(jax.random.fold_in(key, step))
        position = prompts.get_state()

        def undo(position: dict[str, Any] = position) -> None:
            """Save the state before this step, of which nothing is left: it will happen alike."""
            prompts.set_state(position)
            save()
            checkpoints.wait()

        asked = place(next(prompts))
        policy_params = networks.decoder_params(state.policy.params)
        batch = clock.time("rollout", programs.respond, policy_params, *asked, step_key)
        if stop.requested and jax.process_count() == 1:  # several agree once a step, below
            undo()
            break
        critic_params = None if state.critic is None else state.critic.params
        readings = clock.time("reading", programs.read, state.policy.params, critic_params, reference_params, batch)
        try:
            rewards = clock.time(
                "scoring", programs.reward, state.feedback.calibration, batch, readings.reference_log_probs
            )
        except UserError:  # of a reward function
            undo()
            raise
        if stop.requested and jax.process_count() == 1:
            undo()
            break
        rollout, feedback, metrics = programs.estimate(state.feedback, batch, readings, rewards)
        told = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if not math.isfinite(told["reward"]):
            undo()
            raise UserError(
                f"step {step + 1}: the reward of the responses is {told['reward']}, no finite number; the reward model "
                f"is spoiled, give another {flag('reward.model')}; {_last_good(checkpoints)}"
            )
        state, updates = clock.time("update", update, programs, state, rollout, order_key, config, next_ptx)
        state = dataclasses.replace(state, feedback=feedback)
        step += 1

        told |= _averaged(jax.device_get(updates))
        _check_finite(step, told, checkpoints)
        reporter.step(step, told | clock.rates(told["tokens"], told["prompt_tokens"]))
        last, held_out_reward = step == num_steps, None
        if last or step % eval_every == 0:
            owed = not evaluated()  # which the same command makes good
        stopping = agree(stop.requested)
        if last or step % checkpoint_every == 0 or stopping:
            save()
        if stopping:
            break
    checkpoints.wait()
    return state, step >= num_steps and not owed


class _Clock:
    """Seconds of each phase, its results waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, phase: str, function: Callable[..., Any], *args: Any) -> Any:
        started = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        self.seconds[phase] = time.perf_counter() - started
        return result

    def rates(self, response_tokens: float, prompt_tokens: float) -> dict[str, float]:
        """Seconds and tokens per second of each phase and of all: sampled tokens in the rollout, else all."""
        total = sum(self.seconds.values())
        rates = {"step_seconds": total, "tokens_per_second": response_tokens / total}
        for phase, seconds in self.seconds.items():
            tokens = response_tokens if phase == "rollout" else response_tokens + prompt_tokens
            rates |= {f"{phase}_seconds": seconds, f"{phase}_tokens_per_second": tokens / seconds}
        return rates


def _averaged(updates: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over the updates of a step; of the first one alone, the KL and ratio that should be 0 and 1 there."""
    names = [name for name in updates[0] if name != "weight"]
    means = {name: float(np.mean([row[name] for row in updates])) for name in names}
    first = {f"{name}/first": float(updates[0][name]) for name in ("approx_kl", "ratio_error")}
    return {name: x for name, x in (means | first).items() if not (name == "ptx_loss" and math.isnan(x))}


def _check_finite(step: int, metrics: dict[str, float], checkpoints: Checkpoints) -> None:
    bad = [name for name in ("loss", "value_loss", "grad_norm", "critic_grad_norm", "reward", "kl") if name in metrics]
    bad = [name for name in bad if not math.isfinite(metrics[name])]
    if bad:
        raise UserError(
            f"step {step}: {', '.join(bad)} not finite, so the run stopped before saving it; "
            f"{_last_good(checkpoints)}; try a lower {flag('optimizer.lr')} and {flag('critic.optimizer.lr')}, or a "
            f"lower {flag('ppo.reward_clip')}"
        )


def _last_good(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    saved = checkpoints.steps()
    return f"the last good checkpoint is {checkpoints.folder / str(saved[-1])}" if saved else "nothing was saved yet"
