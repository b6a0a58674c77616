"""What PPO carries from step to step, and what one update takes."""

import dataclasses
from typing import Any

import jax

from jaxrm.algorithms.ppo_config import PPOConfig
from jaxrm.algorithms.state import TrainState
from jaxrm.types import Rollout, TokenBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RewardAndKLState:
    """Scale and center of the rewards, and the KL coefficient; both may move from step to step.

    Attributes:
      calibration: scale and (running) center of the token rewards, a `jaxrm.ops.reward_scaling.Calibration`; of a sum
        of sources one for each, by name.
      kl_coef: ``[]`` float32, beta.
    """

    calibration: Any
    kl_coef: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PPOState:
    """Everything that a run carries from one step to the next.

    Attributes:
      policy: of the decoder, or of both heads on one trunk.
      critic: None where it has no trunk of its own.
      feedback: as it is now.
      initial_calibration: as it was before the first step; evaluations use it, so that they can be compared.
    """

    policy: TrainState
    critic: TrainState | None
    feedback: RewardAndKLState
    initial_calibration: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PPOBatch:
    """Batch of one update.

    Attributes:
      rollout: responses ``[B, T]``.
      ptx: rows of SFT data, or None.
      ptx_weight: ``[rows]`` float32, the weight of the responses' loss over SFT tokens, the same in every row: it makes
        of the sum over SFT tokens that weight times their mean, so that both losses are divided by the same number;
        None without ``ptx``.
    """

    rollout: Rollout
    ptx: TokenBatch | None = None
    ptx_weight: jax.Array | None = None


def steps_of(state: PPOState, config: PPOConfig) -> int:
    """Steps that a state has been through: each updates on one rollout."""
    return int(state.policy.step) // (config.num_epochs * config.num_minibatches)
