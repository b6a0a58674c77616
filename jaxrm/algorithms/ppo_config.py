"""The `ppo`, `rollout` and `critic` sections of a config."""

from dataclasses import dataclass, field

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.errors import UserError, flag, option
from jaxrm.models.generate import SamplingConfig
from jaxrm.ops import kl
from jaxrm.sharding.mesh import MeshConfig


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347) with a reward at every token.

    The defaults are those of the published scripts of the paper's group.

    Attributes:
      num_epochs: passes over each rollout.
      num_minibatches: updates in a pass, each on its share of the responses.
      clip: epsilon, how far the ratio of new to old probabilities pays.
      value_clip: epsilon_v, how far a value may move from the old one and still be trained.
      reward_clip: c, bound on the absolute reward of a token, KL penalty included.
      discount: gamma.
      gae_lambda: lambda of the generalized advantage estimate (Schulman et al. 2015, arXiv 1506.02438).
      kl_coef: beta, nats to rewards; where ``kl_target`` is given, the first one.
      kl_estimator: of the penalty in the reward: ``k1`` is the log-ratio itself, ``k2`` half its square, ``k3`` the
        one that is never negative.
      kl_target: KL to the reference in nats a response that an adaptive controller aims at (Ziegler et al. 2019,
        arXiv 1909.08593); None keeps ``kl_coef``.
      kl_horizon: responses in which the controller moves ``kl_coef`` by as much as the KL is off, a fifth at most.
      kl_loss_coef: weight of the ``k2`` estimate as a term of the loss, besides the penalty in the reward.
      missing_end_penalty: taken off the last token's reward of a response that was cut off before its end token.
      whiten_advantages: give the advantages of a rollout zero mean and unit standard deviation.
      normalize_rewards: divide token rewards by their standard deviation in the rollout.
      ptx_coef: weight of the next-token loss on SFT data, where ``config.ptx`` gives any.
      shared_trunk: one trunk with two heads in place of a critic of its own; halves the memory.
      value_coef: weight of the value loss where the trunk is shared.
    """

    num_epochs: int = 1
    num_minibatches: int = 1
    clip: float = 0.2
    value_clip: float = 5.0
    reward_clip: float = 50.0
    discount: float = 1.0
    gae_lambda: float = 0.95
    kl_coef: float = 0.02
    kl_estimator: str = "k1"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    kl_loss_coef: float = 0.0
    missing_end_penalty: float = 0.0
    whiten_advantages: bool = False
    normalize_rewards: bool = False
    ptx_coef: float = 16.0
    shared_trunk: bool = False
    value_coef: float = 0.1

    def __post_init__(self) -> None:
        finite = float("inf")
        for name, good, required in (
            ("num_epochs", self.num_epochs >= 1, "at least 1"),
            ("num_minibatches", self.num_minibatches >= 1, "at least 1"),
            ("clip", 0 < self.clip < 1, "between 0 and 1"),
            ("value_clip", self.value_clip > 0, "above 0"),
            ("reward_clip", self.reward_clip > 0, "above 0"),
            ("discount", 0 < self.discount <= 1, "above 0 and at most 1"),
            ("gae_lambda", 0 <= self.gae_lambda <= 1, "from 0 to 1"),
            ("kl_coef", 0 <= self.kl_coef < finite, "at least 0 and finite"),
            ("kl_estimator", self.kl_estimator in kl.ESTIMATORS, f"one of {', '.join(kl.ESTIMATORS)}"),
            (
                "kl_target",
                self.kl_target is None or 0 < self.kl_target < finite,
                "above 0, or None for a fixed kl_coef",
            ),
            ("kl_horizon", self.kl_horizon >= 1, "at least 1"),
            ("kl_loss_coef", 0 <= self.kl_loss_coef < finite, "at least 0 and finite"),
            ("missing_end_penalty", 0 <= self.missing_end_penalty < finite, "at least 0 and finite"),
            ("ptx_coef", 0 <= self.ptx_coef < finite, "at least 0 and finite"),
            ("value_coef", 0 < self.value_coef < finite, "above 0 and finite"),
        ):
            if not good:
                raise UserError(
                    f"{option(f'ppo.{name}')} is {getattr(self, name)!r}; it must be {required}, "
                    f"e.g. {flag(f'ppo.{name}')}={getattr(PPOConfig, name)}"
                )
        if self.kl_target is not None and self.kl_coef == 0:
            raise UserError(
                f"{option('ppo.kl_coef')} is 0, which the controller of {option('ppo.kl_target')} can never raise; "
                f"e.g. {flag('ppo.kl_coef')}=0.02"
            )


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy answers the prompts that it is trained on.

    Attributes:
      sampling: temperature and length of responses; prompts have what ``config.data.max_length`` leaves of a row.
        Top-k and top-p are refused: log-probs would not be those that tokens were drawn with.
      mesh: how the devices of ``config.mesh`` lie while the policy answers; None as they lie in training. Training
        wants parameters in shards, but writing token by token wants them whole, or split over ``tensor`` alone:
        ``--config.rollout.mesh.fsdp=1``. It costs a copy of the policy in the compute dtype while it answers, 2 bytes
        a parameter in bfloat16, and for the loop over tokens that once more, both divided by what ``fsdp``,
        ``context`` and ``tensor`` are here. Tokens are drawn alike.
    """

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=128))
    mesh: MeshConfig | None = None


@dataclass(frozen=True)
class CriticConfig:
    """The critic, which says what a state is worth.

    Attributes:
      path: folder of the run that its trunk starts from, a scalar reward model or a policy. None takes the scalar
        reward model where rewards come from one, else the policy.
      optimizer: of the critic; its schedule has the steps of the policy's. A shared trunk is trained by the policy's.
    """

    path: str | None = None
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))
