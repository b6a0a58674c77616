"""The `ppo`, `rollout` and `critic` sections of a config."""

from dataclasses import dataclass, field
from typing import Literal

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.config.fields import above, at_least, at_most, below, bounded, check, finite, one_of, place, typed, wrong
from jaxrm.errors import UserError
from jaxrm.models.sampling import SamplingConfig
from jaxrm.ops import kl, losses
from jaxrm.sharding.mesh import MeshConfig

ADVANTAGES = ("gae", "rloo", "grpo", "reinforce++")
_OF_VALUES = ("gae_lambda", "value_clip", "value_coef", "shared_trunk")


@dataclass(frozen=True)
class PPOConfig:
    """Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347) with a reward at every token.

    The defaults are those of the published scripts of the paper's group, but for ``missing_end_penalty``.

    Attributes:
      advantage: what a token is worth. ``gae`` asks a critic. The others have none, and compare the responses to a
        prompt, ``config.rollout.responses_per_prompt`` of them, with each other (`jaxrm.ops.advantages`): ``rloo``
        (arXiv 2402.14740; its KL counts token by token, so only with ``kl_coef=0`` as published) and ``grpo`` (arXiv
        2402.03300) from two on; ``reinforce++`` (arXiv 2501.03262) also one alone, since it is whitened over the
        batch. With ``grpo`` a token without a span, of the kind ``spans``,
        counts as a reward of 0, and so gets the mean taken off.
      num_epochs: passes over each rollout.
      num_minibatches: updates in a pass, each on its share of the responses.
      clip: epsilon, how far the ratio of new to old probabilities pays. With one epoch of one minibatch the ratio is 1.
      clip_high: the same above 1, where it is to be wider (arXiv 2503.14476); None is ``clip``.
      importance_cap: weigh the policy's loss of a token by ``min(exp(log pi_old - log pi_sampler), cap)``, for samplers
        whose log-probs differ from those of the training forward (`jaxrm.ops.losses.importance_weights`). 2 is common;
        None weighs every token alike.
      loss_aggregation: how the losses of tokens are averaged: over all tokens of the batch (``token``), first over
        those of each response (``sequence``, as in the paper of GRPO), or over the most tokens that the responses may
        have (``constant``, Dr. GRPO, arXiv 2503.20783). A critic's loss alike.
      value_clip: epsilon_v, how far a value may move from the old one and still be trained.
      reward_clip: c, bound on the absolute reward of a token, KL penalty included.
      discount: gamma.
      gae_lambda: lambda of the generalized advantage estimate (Schulman et al. 2015, arXiv 1506.02438).
      kl_coef: beta, the weight of the KL to the reference, in rewards a nat; where ``kl_target`` is given, the first
        one. It counts once: as a penalty in the reward, and with ``grpo`` as a term of the loss instead, as published.
      kl_estimator: of the penalty in the reward: ``k1`` is the log-ratio itself, ``k2`` half its square, ``k3`` the
        one that is never negative.
      kl_target: KL to the reference in nats a response that an adaptive controller aims at (Ziegler et al. 2019,
        arXiv 1909.08593); None keeps ``kl_coef``.
      kl_horizon: responses in which the controller moves ``kl_coef`` by as much as the KL is off, a fifth at most.
      kl_loss_coef: weight of a KL as a term of the loss, besides the penalty in the reward; not with ``grpo``.
      kl_loss_estimator: of the KL in the loss, ``k2`` or ``k3``. ``k2`` is the one whose gradient is that of the KL;
        None takes ``k3`` with ``grpo``, as published, else ``k2``.
      missing_end_penalty: taken off the last token's reward of a response that was cut off before its end token (Huang
        et al. 2024, arXiv 2403.17031). What is left of it counts as the whole response: a scalar reward model is read
        at its last token, and nothing is worth anything after it. Without a penalty, a policy that never ends is paid
        like one that does. With ``config.reward.scale=unit``, 1 is the standard deviation of the SFT policy's rewards.
      early_end_penalty: taken off the last token's reward of a response that ended where the seq2seq reward model would
        have gone on, that is where its end token has tag - (jaxrm choice). ``literal`` charges such an end as one wrong
        token, however much is left unsaid, so a policy that expects to be wrong may learn to say nothing.
      whiten_advantages: give the advantages of a rollout zero mean and unit standard deviation; ``reinforce++`` does.
      normalize_rewards: divide token rewards by their standard deviation in the rollout.
      packing: let prompts with their responses share rows where policy, reference and critic read them, as SFT does, so
        that a short answer costs less than the longest there may be (`jaxrm.algorithms.row_packing`). Losses are the
        same but for rounding. The programs are compiled again where another number of rows does, of seven that there
        are; and the host waits for the lengths before each update.
      ptx_coef: weight of the next-token loss on SFT data, where ``config.ptx`` gives any.
      shared_trunk: one trunk with two heads in place of a critic of its own; halves the memory.
      value_coef: weight of the value loss where the trunk is shared.
    """

    advantage: str = bounded("gae", one_of(*ADVANTAGES))
    num_epochs: int = bounded(1, at_least(1))
    num_minibatches: int = bounded(1, at_least(1))
    clip: float = bounded(0.2, above(0), below(1))
    clip_high: float | None = bounded(None, above(0), finite, meaning="that of clip")
    importance_cap: float | None = bounded(None, at_least(1), finite, meaning="no weights")
    loss_aggregation: str = bounded("token", one_of(*losses.AGGREGATIONS))
    value_clip: float = bounded(5.0, above(0))
    reward_clip: float = bounded(50.0, above(0))
    discount: float = bounded(1.0, above(0), at_most(1))
    gae_lambda: float = bounded(0.95, at_least(0), at_most(1))
    kl_coef: float = bounded(0.02, at_least(0), finite)
    kl_estimator: str = bounded("k1", one_of(*kl.ESTIMATORS))
    kl_target: float | None = bounded(None, above(0), finite, meaning="a fixed kl_coef")
    kl_horizon: int = bounded(10_000, at_least(1))
    kl_loss_coef: float = bounded(0.0, at_least(0), finite)
    kl_loss_estimator: str | None = bounded(None, one_of("k2", "k3"), meaning="that of the advantage")
    missing_end_penalty: float = bounded(1.0, at_least(0), finite)
    early_end_penalty: float = bounded(0.0, at_least(0), finite)
    whiten_advantages: bool = False
    normalize_rewards: bool = False
    packing: bool = False
    ptx_coef: float = bounded(16.0, at_least(0), finite)
    shared_trunk: bool = False
    value_coef: float = bounded(0.1, above(0), finite)

    def __post_init__(self) -> None:
        check(self)
        if self.kl_target is not None and self.kl_coef == 0:
            required = f"above 0, since the controller of {place(self, 'kl_target')} can never raise 0"
            raise wrong(self, "kl_coef", required, 0.02)
        if self.clip_high is not None and self.clip_high < self.clip:
            required = f"at least {place(self, 'clip')}, {self.clip}, since it widens the range upwards"
            raise wrong(self, "clip_high", required, self.clip)
        if not self.has_values:
            for name in (*_OF_VALUES, "discount"):
                lacks = "sums rewards without a discount" if name == "discount" else "has no critic"
                self._refuse(name, f"{place(self, 'advantage')}={self.advantage} {lacks}")
        if self.advantage == "grpo":
            in_loss = f"{place(self, 'advantage')}=grpo has its KL in the loss"
            self._refuse("kl_target", f"{in_loss}, which no controller moves")
            self._refuse("kl_horizon", f"{in_loss}, which no controller moves")
            self._refuse("kl_estimator", f"{in_loss}, see {place(self, 'kl_loss_estimator')}")
            self._refuse("kl_loss_coef", f"{in_loss}, weighed by {place(self, 'kl_coef')}, and it would count twice")
        elif self.kl_loss_estimator is not None and self.kl_loss_coef == 0:
            raise UserError(
                f"{place(self, 'kl_loss_estimator')} is {self.kl_loss_estimator!r}, but the loss has no KL; use "
                f"{typed(self, 'kl_loss_coef', 0.02)} or {typed(self, 'kl_loss_estimator', None)}"
            )

    @property
    def has_values(self) -> bool:
        """Whether there are values of states: a critic's, or a value head's on the policy's trunk."""
        return self.advantage == "gae"

    @property
    def is_whitened(self) -> bool:
        """Whether advantages are whitened over the batch."""
        return self.whiten_advantages or self.advantage == "reinforce++"

    @property
    def reads_log_probs(self) -> bool:
        """Whether advantages depend on log-probs of the policy, by a KL in the reward, or on values."""
        return self.has_values or (self.advantage != "grpo" and self.kl_coef > 0)

    @property
    def loss_kl(self) -> tuple[float, str]:
        """Weight and estimator of the KL that is a term of the loss."""
        if self.advantage == "grpo":
            return self.kl_coef, self.kl_loss_estimator or "k3"
        return self.kl_loss_coef, self.kl_loss_estimator or "k2"

    def _refuse(self, name: str, reason: str) -> None:
        """Refuse a field that is not at its default.

        Raises:
          UserError: naming the field.
        """
        value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
        if value != default:
            raise UserError(
                f"{place(self, name)} is {value!r}, but {reason}; use {typed(self, name, default)} or "
                f"{typed(self, 'advantage', 'gae')}"
            )


def is_one_pass(config: PPOConfig, num_microbatches: int) -> bool:
    """Whether the update reads policy and critic once, in place of a pass for log-probs and values before it.

    It does where it is the only update of its rollout: the log-probs before it are then its own. With microbatches it
    also takes advantages that need neither log-probs nor values: groups and whitening are of the whole batch, and
    microbatches save the memory that two backward passes at once would cost.

    Args:
      config: options of PPO.
      num_microbatches: of an update.
    """
    is_only = config.num_epochs == 1 and config.num_minibatches == 1
    return is_only and (num_microbatches == 1 or not config.reads_log_probs)


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy answers the prompts that it is trained on.

    Attributes:
      sampling: temperature and length of responses; prompts have what ``config.data.max_length`` leaves of a row.
        Top-k and top-p are refused: log-probs would not be those that tokens were drawn with.
      mesh: how the devices of ``config.mesh`` lie while the policy answers. Training wants parameters in shards, but
        writing token by token wants them whole, or split over ``tensor`` alone. None chooses by what a token reads
        (`jaxrm.inference.decode_mesh`); the run prints the choice, and ``run.json`` has it. Where it is not that of
        training, it costs a copy of the policy in the compute dtype while it answers, 2 bytes a parameter in bfloat16,
        and for the loop over tokens that once more, both divided by what ``fsdp``, ``context`` and ``tensor`` are here.
        Tokens are drawn alike.
      weights: how the loop over tokens stores the policy's weights. ``compute`` is in the compute dtype. ``int8`` is a
        byte a weight and a scale for each output, the embedding of the head too, so that a token reads half as much.
        Prompts are read in the compute dtype. Calibration, evaluation and training are not touched.
      cache: how keys and values are stored meanwhile: in the compute dtype, or as ``int8`` with a scale for each token
        and head. Where rows are many or long, a token reads more of these than of weights.
      max_mismatch: most ``sampler_mismatch``, the mean over response tokens of how far the sampler's log-prob is from
        that of the training forward, in nats. Where a step passes it, the run stops with its state saved. None is 0.2
        with ``int8``, and no bound without.
      num_microbatches: parts that a batch of prompts is answered in, one after another, so that the key-value cache is
        that of a part. The weights are read once for each part and token. Tokens are drawn alike.
      slots: responses of a batch that are written at once; None for all of them. Where there are fewer, the slots of
        a prompt whose responses have ended are taken by the next prompt, so that none is idle while others wait, and
        the key-value cache is that of the slots. Its worth is in responses of very different lengths. A multiple of
        ``responses_per_prompt`` and of the devices of the data and fsdp axes. Tokens are drawn alike.
      responses_per_prompt: n, in PPO: responses to each prompt of a step. ``config.data.batch_size`` counts responses,
        so a step has 1 / n as many prompts. A prompt is read, and its keys and values stored, once for all n.
    """

    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=128))
    mesh: MeshConfig | None = None
    weights: Literal["compute", "int8"] = "compute"
    cache: Literal["compute", "int8"] = "compute"
    max_mismatch: float | None = bounded(None, above(0), meaning="0.2 with int8")
    num_microbatches: int = bounded(1, at_least(1))
    slots: int | None = bounded(None, at_least(1))
    responses_per_prompt: int = bounded(1, at_least(1))

    def __post_init__(self) -> None:
        check(self)

    @property
    def is_quantized(self) -> bool:
        """Whether the sampler reads codes."""
        return "int8" in (self.weights, self.cache)

    @property
    def mismatch_bound(self) -> float | None:
        """The largest ``sampler_mismatch`` that a run goes on with; None for any."""
        return 0.2 if self.max_mismatch is None and self.is_quantized else self.max_mismatch


@dataclass(frozen=True)
class CriticConfig:
    """The critic, which says what a state is worth.

    Attributes:
      path: folder of the run that its trunk starts from, a scalar reward model or a policy. None takes the scalar
        reward model where rewards come from one, else the policy.
      head: what it reads values with at first. ``zero`` is 0 everywhere, so that advantages are those of the rewards
        alone until it has learned. ``reward_model`` is the head of the scalar reward model whose trunk it has, in the
        units of its calibrated rewards: a value is then the score of what is written so far. That wants rewards of the
        kind ``scalar`` from the same run, alone or as the only scalar reward model of a sum. Best is a run whose head
        was trained to be a value function (`jaxrm.algorithms.scalar_rm.ScalarRMConfig.prefix_coef`, arXiv 2604.22981).
      optimizer: of the critic; its schedule has the steps of the policy's. A shared trunk is trained by the policy's.
    """

    path: str | None = None
    head: Literal["zero", "reward_model"] = "zero"
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))

    def __post_init__(self) -> None:
        check(self)
