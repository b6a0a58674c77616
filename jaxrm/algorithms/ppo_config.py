"""The `ppo`, `rollout` and `critic` sections of a config."""

from dataclasses import dataclass, field

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.config.fields import above, at_least, at_most, below, bounded, check, finite, one_of, place, wrong
from jaxrm.models.generate import SamplingConfig
from jaxrm.ops import kl
from jaxrm.sharding.mesh import MeshConfig


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347) with a reward at every token.

    The defaults are those of the published scripts of the paper's group, but for ``missing_end_penalty``.

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
      missing_end_penalty: taken off the last token's reward of a response that was cut off before its end token (Huang
        et al. 2024, arXiv 2403.17031). What is left of it counts as the whole response: a scalar reward model is read
        at its last token, and nothing is worth anything after it. Without a penalty, a policy that never ends is paid
        like one that does. With ``config.reward.scale=unit``, 1 is the standard deviation of the SFT policy's rewards.
      whiten_advantages: give the advantages of a rollout zero mean and unit standard deviation.
      normalize_rewards: divide token rewards by their standard deviation in the rollout.
      ptx_coef: weight of the next-token loss on SFT data, where ``config.ptx`` gives any.
      shared_trunk: one trunk with two heads in place of a critic of its own; halves the memory.
      value_coef: weight of the value loss where the trunk is shared.
    """

    num_epochs: int = bounded(1, at_least(1))
    num_minibatches: int = bounded(1, at_least(1))
    clip: float = bounded(0.2, above(0), below(1))
    value_clip: float = bounded(5.0, above(0))
    reward_clip: float = bounded(50.0, above(0))
    discount: float = bounded(1.0, above(0), at_most(1))
    gae_lambda: float = bounded(0.95, at_least(0), at_most(1))
    kl_coef: float = bounded(0.02, at_least(0), finite)
    kl_estimator: str = bounded("k1", one_of(*kl.ESTIMATORS))
    kl_target: float | None = bounded(None, above(0), finite, meaning="a fixed kl_coef")
    kl_horizon: int = bounded(10_000, at_least(1))
    kl_loss_coef: float = bounded(0.0, at_least(0), finite)
    missing_end_penalty: float = bounded(1.0, at_least(0), finite)
    whiten_advantages: bool = False
    normalize_rewards: bool = False
    ptx_coef: float = bounded(16.0, at_least(0), finite)
    shared_trunk: bool = False
    value_coef: float = bounded(0.1, above(0), finite)

    def __post_init__(self) -> None:
        check(self)
        if self.kl_target is not None and self.kl_coef == 0:
            required = f"above 0, since the controller of {place(self, 'kl_target')} can never raise 0"
            raise wrong(self, "kl_coef", required, 0.02)


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
      num_microbatches: parts that a batch of prompts is answered in, one after another, so that the key-value cache is
        that of a part. The weights are read once for each part and token. Tokens are drawn
        from the same distribution, with other random numbers.
    """

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=128))
    mesh: MeshConfig | None = None
    num_microbatches: int = bounded(1, at_least(1))

    def __post_init__(self) -> None:
        check(self)


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
