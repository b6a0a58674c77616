"""The loop of PPO: step after step until the last, an evaluation and a checkpoint now and then.

A step has four phases, and so have its metrics: rollout, log_probs, scoring, update. Where a rollout has one update
alone, log_probs are those of the reference, and the update reads policy and critic itself. The arithmetic is in
`jaxrm.algorithms.ppo`. A step is stopped between two phases or not at all: what was begun is dropped, the data go
back to where they were, and the step happens alike when the run goes on.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxrm.algorithms import ppo
from jaxrm.algorithms.ppo import Programs
from jaxrm.algorithms.ppo_one_pass import OnePassBatch
from jaxrm.algorithms.ppo_state import PPOState, steps_of
from jaxrm.algorithms.reward_config import naming_source
from jaxrm.algorithms.rollout import TokenLogProbs
from jaxrm.errors import UserError, flag, option
from jaxrm.runtime.checkpoint import Checkpoints
from jaxrm.runtime.preemption import StoppedError, StopRequest, agree
from jaxrm.stage_config import PPO
from jaxrm.stages.ppo.checkpoints import save
from jaxrm.stages.ppo.data import PPOData
from jaxrm.stages.ppo.learner import Learner
from jaxrm.stages.rewards.calibration import not_finite
from jaxrm.stages.rewards.classifier import cut_shares
from jaxrm.types import ResponseBatch, TokenRewards


class Reporter(Protocol):
    """Where the metrics of a run go: console, files, dashboards."""

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of one step."""
        ...

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Held-out metrics after ``step`` steps."""
        ...


@dataclasses.dataclass(frozen=True)
class PPORun:
    """A run of PPO, without its state.

    Attributes:
      learner: config, networks and number of steps.
      programs: jitted, from `Learner.programs`.
      base: under the adapters of all models; ``{}`` where they have none.
      reference_params: of the frozen SFT policy; its adapters alone where there is a base.
      data: at the position that belongs to the state.
      evaluate: ``(step, state)`` to held-out metrics, among them ``eval_reward``; None where it was asked to stop.
      checkpoints: where to save.
      reporter: gets the metrics of every step and evaluation.
      stop: read after every phase of a step.
    """

    learner: Learner
    programs: Programs
    base: Any
    reference_params: Any
    data: PPOData
    evaluate: Callable[[int, PPOState], dict[str, float] | None]
    checkpoints: Checkpoints
    reporter: Reporter
    stop: StopRequest

    def is_saving(self, step: int) -> bool:
        """Whether a step has a checkpoint also where nobody asks for it."""
        return step == self.learner.num_steps or step % self.learner.config.checkpoint.every == 0

    def save(self, step: int, state: PPOState, eval_reward: float | None) -> None:
        """Save a state, unless its step has been saved already."""
        is_passing = step == 0 or not self.is_saving(step)
        save(self.checkpoints, step, state, self.learner.networks, self.data, eval_reward, is_passing=is_passing)

    def rewind(self, step: int, state: PPOState, eval_reward: float | None, position: dict[str, Any]) -> None:
        """Drop the step after ``step``, which was begun from ``position`` of the data, and save the state before it."""
        self.data.set_state(position)
        self.save(step, state, eval_reward)
        self.checkpoints.wait()


def fit(run: PPORun, state: PPOState, key: jax.Array, *, evaluation_pending: bool = False) -> tuple[PPOState, bool]:
    """Train up to ``run.learner.num_steps`` steps, or until asked to stop.

    Args:
      run: everything but the state.
      state: where to start; donated.
      key: typed PRNG key of the run; step ``i`` samples and shuffles with ``fold_in(key, i)``.
      evaluation_pending: the run stopped before the evaluation that belongs to ``state``.

    Returns:
      The state, and whether it reached the last step and its evaluation.

    Raises:
      UserError: a reward function failed, and the state before is saved; a reward, a loss or a gradient is not
        finite, and nothing of that step is saved; or the sampler is too far from the policy, and the state is saved.
    """
    config, num_steps = run.learner.config, run.learner.num_steps
    step, eval_reward = steps_of(state, config.ppo), None
    if step == 0 or evaluation_pending:
        eval_reward = _evaluate(run, step, state)
        evaluation_pending = eval_reward is None
        if eval_reward is not None and step > 0:
            run.checkpoints.add_loss(step, -eval_reward)
    is_stopping = evaluation_pending
    while step < num_steps and not is_stopping:
        clock, position = _Clock(), run.data.get_state()
        step_key, order_key = jax.random.split(jax.random.fold_in(key, step))
        try:
            collected = _collect(run, state, step_key, clock)
        except StoppedError:  # while a judge was asked
            collected = None
        except UserError:  # of a reward function
            run.rewind(step, state, eval_reward, position)
            raise
        if collected is None:
            run.rewind(step, state, eval_reward, position)
            is_stopping = True
            break
        batch, sampler_log_probs, token_log_probs, reference_log_probs, rewards = collected
        reward_metrics = {name: float(x) for name, x in jax.device_get(run.programs.reward_metrics(rewards)).items()}
        if unusable := [name for name in _reward_names(config) if not math.isfinite(reward_metrics[name])]:
            run.rewind(step, state, eval_reward, position)
            raise _not_finite_reward(config, step + 1, unusable[0], run.checkpoints)
        if token_log_probs is None:
            inputs = OnePassBatch(batch, reference_log_probs, rewards, sampler_log_probs, run.data.next_ptx())
            state, estimated, updates = clock.time(
                "update", ppo.update_in_one_pass, run.programs, state, run.base, inputs
            )
        else:
            frozen = run.learner.networks.frozen(run.base)
            rollout, feedback, estimated = run.programs.estimate(state.feedback, batch, token_log_probs, rewards)
            state, updates = clock.time(
                "update", ppo.update, run.programs, config.ppo, state, frozen, rollout, order_key, run.data.next_ptx
            )
            state = dataclasses.replace(state, feedback=feedback)
        step += 1
        run.stop.has_progress = True

        estimated, updates = jax.device_get((estimated, updates))
        metrics = {name: float(x) for name, x in estimated.items()} | reward_metrics
        metrics |= cut_shares(run.programs.scoring)
        metrics |= _averaged(updates)
        _check_finite(step, metrics, run.checkpoints)
        run.reporter.step(step, metrics | clock.rates(metrics["tokens"], metrics["prompt_tokens"]))
        _check_mismatch(run, step, state, metrics["sampler_mismatch"])
        is_last, eval_reward = step == num_steps, None
        if is_last or step % config.evaluation.every == 0:
            eval_reward = _evaluate(run, step, state)
            is_stopping = eval_reward is None  # the same command evaluates
        is_stopping = is_stopping or agree(run.stop.requested)
        if run.is_saving(step) or is_stopping:
            run.save(step, state, eval_reward)
    run.checkpoints.wait()
    return state, step >= num_steps and not is_stopping


class _Collected(NamedTuple):
    """Responses and what the update follows from; ``token_log_probs`` are None where it is in one pass."""

    batch: ResponseBatch
    sampler_log_probs: jax.Array
    token_log_probs: TokenLogProbs | None
    reference_log_probs: jax.Array
    rewards: TokenRewards


def _collect(run: PPORun, state: PPOState, key: jax.Array, clock: "_Clock") -> _Collected | None:
    """Rollout, log_probs and scoring of a step, from which the update follows; None where it was asked to stop.

    Raises:
      UserError: of a reward function.
    """
    programs, token_log_probs = run.programs, None
    decoder_params = run.learner.decoder_params(run.base, state.policy.params)
    prompts = run.data.next_prompts()
    batch, sampler_log_probs = clock.time(
        "rollout", programs.rollout, decoder_params, prompts.tokens, prompts.mask, key
    )
    if _must_stop(run):
        return None
    if programs.one_pass is None:
        critic_params = None if state.critic is None else state.critic.params
        params = state.policy.params, critic_params, run.reference_params
        read = functools.partial(programs.log_probs, run.base, *params)
        token_log_probs = clock.time("log_probs", lambda: read(programs.pack_rows(batch)))
        token_log_probs = token_log_probs._replace(sampler_log_probs=sampler_log_probs)
        reference = token_log_probs.reference_log_probs
    else:
        read_reference = functools.partial(programs.reference_log_probs, run.base, run.reference_params)
        reference = clock.time("log_probs", lambda: read_reference(programs.pack_rows(batch)))
    recorded = prompts.with_records(batch)
    rewards = clock.time("scoring", programs.scoring, state.feedback.calibration, recorded, reference)
    return None if _must_stop(run) else _Collected(batch, sampler_log_probs, token_log_probs, reference, rewards)


def _must_stop(run: PPORun) -> bool:
    # Several processes must stop at the same place: they agree once a step, at its end.
    return run.stop.requested and jax.process_count() == 1


def _evaluate(run: PPORun, step: int, state: PPOState) -> float | None:
    """Held-out reward of a state; None where the evaluation was asked to stop.

    Raises:
      UserError: of a reward function; the state is saved.
    """
    try:
        metrics = run.evaluate(step, state)
    except UserError:
        run.save(step, state, None)
        run.checkpoints.wait()
        raise
    if metrics is None:
        return None
    run.reporter.evaluation(step, metrics)
    return metrics["eval_reward"]


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


def _reward_names(config: PPO) -> list[str]:
    """The metrics that are rewards: of each source, if there are several, and of their sum."""
    return [*(f"reward/{name}" for name in config.rewards), "reward"]


def _not_finite_reward(config: PPO, step: int, metric: str, checkpoints: Checkpoints) -> UserError:
    name = metric.removeprefix("reward").lstrip("/")
    if config.rewards and not name:
        heaviest = max(config.rewards, key=lambda one: abs(config.rewards[one].weight))
        return UserError(
            f"{option('rewards')} adds up to no finite number in step {step}, though each source is finite; give "
            f"smaller weights, e.g. {flag(f'rewards.{heaviest}.weight')}=1.0; {_last_good(checkpoints)}"
        )
    with naming_source(config, name or "reward"):
        return UserError(f"{not_finite(f'the responses of step {step}')}; {_last_good(checkpoints)}")


def _check_finite(step: int, metrics: dict[str, float], checkpoints: Checkpoints) -> None:
    checked = ("loss", "value_loss", "grad_norm", "critic_grad_norm", "reward", "kl")
    bad = [name for name in checked if not math.isfinite(metrics.get(name, 0.0))]
    if bad:
        raise UserError(
            f"step {step}: {', '.join(bad)} not finite, so the run stopped before saving it; "
            f"{_last_good(checkpoints)}; try a lower {flag('optimizer.lr')} and {flag('critic.optimizer.lr')}, or a "
            f"lower {flag('ppo.reward_clip')}"
        )


def _check_mismatch(run: PPORun, step: int, state: PPOState, mismatch: float) -> None:
    """Stop, with the state saved, where the sampler's log-probs are too far from those of the training forward."""
    rollout = run.learner.config.rollout
    bound = rollout.mismatch_bound
    if bound is None or mismatch <= bound:
        return
    run.save(step, state, None)
    run.checkpoints.wait()
    field, name = option("rollout.max_mismatch"), flag("rollout.max_mismatch")
    codes = [part for part in ("weights", "cache") if getattr(rollout, part) == "int8"]
    exact = "".join(f"{flag(f'rollout.{part}')}=compute " for part in codes) + ("or, to allow more, " if codes else "")
    raise UserError(
        f"step {step}: sampler_mismatch is {mismatch:.3g} nats a token, but {field} is {bound:g}: responses are not "
        f"drawn from the policy that is trained; the state is saved, and the same command goes on with {exact}"
        f"{name}={2 * mismatch:.2g}"
    )


def _last_good(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    saved = checkpoints.steps()
    return f"the last good checkpoint is {checkpoints.folder / str(saved[-1])}" if saved else "nothing was saved yet"
