"""Scale and center of token rewards, calibrated on the policy's own responses before it has learned anything."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrm.algorithms.ppo import NextCalibration
from jaxrm.algorithms.reward_config import RewardConfig, naming_source, sources_of
from jaxrm.algorithms.rollout import RewardSource, Sampled
from jaxrm.data.prompts import PromptExample
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.sharded_model import ShardedModel
from jaxrm.inference.token_scores import policy_log_probs
from jaxrm.models.sampling import prompt_keys
from jaxrm.ops import reward_scaling
from jaxrm.ops.reward_kinds import Kind, find_kind
from jaxrm.ops.reward_scaling import Calibration, uncalibrated
from jaxrm.runtime.progress import Progress
from jaxrm.stage_config import PPO, BestOfN, Evaluate
from jaxrm.stages.inputs.prompts import fixed_batches
from jaxrm.types import ResponseBatch, TokenRewards


class PolicyRewards:
    """Token rewards of a policy's responses, with that policy as its own reference: before it has learned anything.

    Args:
      config: of the stage.
      policy: its decoder.
      params: of the decoder.
      source: of token rewards.
    """

    def __init__(
        self, config: PPO | BestOfN | Evaluate, policy: ShardedModel, params: Any, source: RewardSource
    ) -> None:
        self._source, self._log_probs = source, None
        if source.needs_reference:
            temperature = config.rollout.sampling.temperature or 1.0
            self._log_probs = policy_log_probs(policy, params, policy.mesh, temperature=temperature)

    def __call__(self, calibration: Any, batch: ResponseBatch) -> TokenRewards:
        """Score responses."""
        reference = None if self._log_probs is None else self._log_probs(batch)
        return self._source(calibration, batch, reference)


def calibration_of(
    config: PPO | BestOfN | Evaluate,
    mesh: Mesh,
    examples: Sequence[PromptExample],
    width: int,
    sample: Callable[[jax.Array, jax.Array, jax.Array], Sampled],
    score: Callable[[Any, ResponseBatch], TokenRewards],
    key: jax.Array,
    show: bool,
) -> Any:
    """Scale and center of the rewards, from responses of the policy before it has learned anything.

    The same responses serve all sources.

    Args:
      config: the whole config.
      mesh: the devices.
      examples: prompts; responses to the first ones are sampled.
      width: that prompts are padded to.
      sample: prompts, mask and the key of each to a response each.
      score: `PolicyRewards`, or like it.
      key: typed PRNG key.
      show: draw a bar.

    Returns:
      A `Calibration`; of several sources one for each, by name.

    Raises:
      UserError: where the rewards are not finite.
    """
    rows, sources = config.data.batch_size, sources_of(config)
    count = -(-max(source.calibration_responses for source in sources.values()) // rows) * rows
    some = [examples[i % len(examples)] for i in range(count)]
    rewards: list[TokenRewards] = []
    with Progress("calibrate", count, unit="responses", enabled=show) as progress:
        for number, prompts in enumerate(fixed_batches(some, rows, width, mesh)):
            keys = prompt_keys(key, number * rows, rows)
            batch = sample(prompts.tokens, prompts.mask, keys).responses
            rewards.append(score(uncalibrated_of(config), prompts.with_records(batch)))
            jax.block_until_ready(rewards)
            progress.update((number + 1) * rows)
    calibrations = {}
    for name, source in sources.items():
        own = [batch.parts[name] for batch in rewards] if config.rewards else rewards
        with naming_source(config, name):
            calibrations[name] = _calibration_of_source(source, own, mesh, name if config.rewards else "")
    return calibrations if config.rewards else calibrations["reward"]


def _calibration_of_source(source: RewardConfig, rewards: Sequence[TokenRewards], mesh: Mesh, name: str) -> Calibration:
    calibration = calibrate(find_kind(source.kind), rewards, scale=source.scale, center=source.center, mesh=mesh)
    if not all(map(math.isfinite, jax.tree.leaves(jax.device_get(calibration)))):
        raise not_finite("the responses that rewards are calibrated on")
    if source.scale == "unit" and float(calibration.scale) == 1.0:
        whose = f" from {name}" if name else ""
        print(
            f"warning: all responses of the SFT policy have the same reward{whose}, so there is nothing to scale or to "
            "learn"
        )
    return calibration


def uncalibrated_of(config: PPO | BestOfN | Evaluate) -> Any:
    """The calibration that leaves values as they are; of several sources one for each, by name."""
    return {name: uncalibrated() for name in config.rewards} if config.rewards else uncalibrated()


def build_next_calibration(config: PPO) -> NextCalibration:
    """The function that moves the running centers of a config's sources from step to step."""

    def move(source: RewardConfig, calibration: Calibration, rewards: TokenRewards) -> Calibration:
        if source.center != "running":
            return calibration
        kind, momentum = find_kind(source.kind), source.center_momentum
        return reward_scaling.update_center(calibration, kind, rewards.values, rewards.mask, momentum=momentum)

    def next_calibration(calibration: Any, rewards: TokenRewards) -> Any:
        if not config.rewards:
            return move(config.reward, calibration, rewards)
        return {name: move(source, calibration[name], rewards.parts[name]) for name, source in config.rewards.items()}

    return next_calibration


def calibration_in_words(calibration: Any) -> str:
    """Scale and center for people, of several sources each."""
    numbers = jax.device_get(calibration)
    if isinstance(numbers, Calibration):
        return f"scale {numbers.scale:.4g}, center {numbers.center:.4g}"
    return "; ".join(f"{name} {calibration_in_words(each)}" for name, each in numbers.items())


def calibration_as_numbers(calibration: Any) -> dict[str, Any]:
    """A calibration for JSON; of several sources one for each, by name."""
    numbers = jax.device_get(calibration)
    if isinstance(numbers, Calibration):
        return {name: float(x) for name, x in dataclasses.asdict(numbers).items()}
    return {name: calibration_as_numbers(each) for name, each in numbers.items()}


def calibration_from_numbers(numbers: Mapping[str, Any]) -> Any:
    """A calibration again that `calibration_as_numbers` wrote."""
    if all(isinstance(x, Mapping) for x in numbers.values()):
        return {name: calibration_from_numbers(each) for name, each in numbers.items()}
    return Calibration(**{name: jnp.float32(x) for name, x in numbers.items()})


def not_finite(where: str) -> UserError:
    """The error for rewards that are no finite numbers; ``where`` says of what.

    A sum calls it below `naming_source`. A source of weight 0 is an error too: it is logged, and NaN says nothing.
    """
    return UserError(
        f"{option('reward')} gives {where} a reward that is no finite number, so its reward model is spoiled; give "
        f"another, e.g. {flag('reward.model')}=RUN_DIR/checkpoints/best"
    )


def calibrate(kind: Kind, rewards: Sequence[TokenRewards], *, scale: Any, center: Any, mesh: Mesh) -> Calibration:
    """Calibration from batches of responses of the SFT policy; the same on every device."""
    replicated = NamedSharding(mesh, PartitionSpec())
    concatenate = jax.jit(
        lambda batches: tuple(jnp.concatenate(x) for x in zip(*batches, strict=True)),
        out_shardings=(replicated, replicated),
    )
    values, mask = concatenate([(batch.values, batch.mask) for batch in rewards])
    fit = jax.jit(
        lambda values, mask: reward_scaling.calibrate(kind, values, mask, scale=scale, center=center),
        out_shardings=replicated,
    )
    return fit(values, mask)
