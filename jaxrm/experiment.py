"""The whole of a config: the sections that live beside the code they configure, in one frozen tree."""

from dataclasses import dataclass, field

from jaxrm.algorithms.best_of_n import BestOfNConfig
from jaxrm.algorithms.dpo import DPOConfig
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.algorithms.scalar_rm import ScalarRMConfig
from jaxrm.config.fields import above, at_least, at_most, below, bounded, check, finite, one_of, wrong
from jaxrm.data.config import DataConfig
from jaxrm.data.pairs import MappingConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.generate import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.runtime.run_folder import OnExisting
from jaxrm.sharding.mesh import MeshConfig

ALGORITHMS = ("sft", "sample_pairs", "seq2seq_rm", "scalar_rm", "ppo", "dpo", "best_of_n", "evaluate")

# What may change between two launches of one run: nothing here changes what is learnt.
RESUMABLE_FIELDS = frozenset(
    {
        "run_dir",
        "on_existing",
        "mesh",
        "rollout.mesh",
        "optimizer.offload",
        "critic.optimizer.offload",
        "checkpoint",
        "logging",
        "evaluation",
    }
)


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out data.

    Attributes:
      every: updates, in PPO rollouts, between evaluations; the first and the last parameters are always evaluated.
      samples: responses to held-out prompts that are generated when training ends, in PPO at every evaluation, or
        corrections that are shown.
      sampling: how.
      corrections: held-out pairs whose two responses a seq2seq reward model corrects when training ends, greedily and
        with no more tokens than ``sampling`` allows; 0 for none.
      judge: embedded task (``task:safety``) whose exact judge says what corrections gain and marks a policy's answers.
    """

    every: int = bounded(100, at_least(1))
    samples: int = bounded(3, at_least(0))
    corrections: int = bounded(64, at_least(0))
    judge: str | None = None
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=64, temperature=0.0))

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class PairsConfig:
    """Pairs sampled from a policy on an embedded task, and labelled by its noisy and biased annotator.

    Attributes:
      count: pairs in all.
      ideal_share: share of pairs in which one of the two responses is the ideal one instead of a sample.
      sampling: how the policy answers.
      batch_size: prompts answered at once.
    """

    count: int = bounded(2000, at_least(1))
    ideal_share: float = bounded(0.0, at_least(0), at_most(1))
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=64, temperature=1.0))
    batch_size: int = bounded(256, at_least(1))

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class AnswersConfig:
    """What the algorithm ``evaluate`` asks a policy, and how it answers.

    Attributes:
      splits: ``heldout``, the held-out prompts of ``config.data``; of an embedded task also the others of
        `jaxrm.data.tasks.SPLITS`, such as ``test`` and ``test_ood``.
      decodings: ``sampled``, as ``config.rollout.sampling`` says, and ``greedy``.
      best_of: responses that are drawn to each prompt and of which ``config.reward`` chooses the best; greedily there
        is but one.
      draw: which draw of the answers this is: policies that are compared need different ones, lest they share their
        luck.
      reference: folder of the run that the KL is measured to; None measures none.
      along: whether the first split is also answered, sampled, by the reference and with every checkpoint that is left
        of the policy's run, which shows what training did to the policy on the way.
      token_rewards: answers of each split and decoding that are kept with their token rewards, where there are any.
    """

    splits: tuple[str, ...] = ("heldout",)
    decodings: tuple[str, ...] = ("sampled", "greedy")
    best_of: int = bounded(1, at_least(1))
    draw: int = bounded(0, at_least(0))
    reference: str | None = None
    along: bool = False
    token_rewards: int = bounded(8, at_least(0))

    def __post_init__(self) -> None:
        check(self)
        for name in ("splits", "decodings"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise wrong(self, name, "each one once, at least one", getattr(AnswersConfig, name))
        if not set(self.decodings) <= {"sampled", "greedy"}:
            raise wrong(self, "decodings", "sampled, greedy or both", AnswersConfig.decodings)


@dataclass(frozen=True)
class Experiment:
    """One run.

    Attributes:
      run_dir: folder of the run; all that it writes is in it. A pipeline fills in that of its stages.
      algorithm: what to run, one of `ALGORITHMS`.
      on_existing: a folder that already holds this run is continued (``resume``), put aside and started anew
        (``restart``) or refused (``error``).
      seed: of everything random: initial parameters, order of the data, sampling.
      num_steps: updates in all, in PPO rollouts, or None for ``num_epochs``.
      num_epochs: passes over the data, where ``num_steps`` is None.
      num_microbatches: parts that a batch is cut into, to save memory; the update is the same.
      ptx: SFT data that PPO mixes in, where it is given.
    """

    run_dir: str = ""
    algorithm: str = bounded("sft", one_of(*ALGORITHMS))
    on_existing: OnExisting = "resume"
    seed: int = bounded(0, at_least(0), below(2**32))
    num_steps: int | None = bounded(None, at_least(1))
    num_epochs: float = bounded(3.0, above(0), finite)
    num_microbatches: int = bounded(1, at_least(1))
    mapping: MappingConfig = field(default_factory=MappingConfig)
    scalar_rm: ScalarRMConfig = field(default_factory=ScalarRMConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    best_of_n: BestOfNConfig = field(default_factory=BestOfNConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    ptx: DataConfig | None = None
    model: ModelSource = field(default_factory=ModelSource)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        check(self)
