"""One config class a stage, and the table of the stages.

The sections live beside the code that they configure. A class has the sections that its stage reads, and no others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from jaxrm.algorithms.best_of_n import BestOfNConfig
from jaxrm.algorithms.dpo import DPOConfig
from jaxrm.algorithms.endpoint_config import RESUMABLE_ENDPOINT_FIELDS
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import (
    RewardConfig,
    RewardKindConfig,
    check_early_end_penalty,
    check_sources,
)
from jaxrm.algorithms.scalar_rm import ScalarRMConfig
from jaxrm.comparison_config import (
    CompareConfig,
    ComparedPolicyConfig,
    ComparisonJudgeConfig,
    PromptSetConfig,
)
from jaxrm.config import dicts, field_names
from jaxrm.config.fields import above, at_least, at_most, below, bounded, check, finite
from jaxrm.config.named_sections import typed_names
from jaxrm.config.recorded import upgraded
from jaxrm.data.config import DataConfig
from jaxrm.data.pairs import MappingConfig
from jaxrm.errors import UserError
from jaxrm.evaluation.config import (
    CorrectionEvaluationConfig,
    EvaluateConfig,
    EvaluationConfig,
    JudgeConfig,
    JudgedEvaluationConfig,
    RankingEvaluationConfig,
)
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import LoRAConfig
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.runtime.run_folder import OnExisting
from jaxrm.sharding.mesh import MeshConfig

# What may change between two launches of one run: nothing here changes what is learned.
RESUMABLE_FIELDS = frozenset(
    {
        "run_dir",
        "on_existing",
        "mesh",
        "rollout.mesh",
        "rollout.weights",
        "rollout.cache",
        "rollout.max_mismatch",
        "reward.function_workers",
        "reward.function_timeout",
        "rewards.*.function_workers",
        "rewards.*.function_timeout",
        "optimizer.offload",
        "critic.optimizer.offload",
        "checkpoint",
        "logging",
        "evaluation",
        "policies",
        "prompts",
        "judges",
        "compare",
        *(f"{source}.endpoint.{name}" for source in ("reward", "rewards.*") for name in RESUMABLE_ENDPOINT_FIELDS),
    }
)


@dataclass(frozen=True)
class PairsConfig:
    """Pairs sampled from a policy on an embedded task, and labeled by its noisy and biased annotator.

    Attributes:
      count: pairs in all.
      ideal_share: share of pairs in which one of the two responses is the ideal one instead of a sample.
      annotator_bias: times the task's bias. With 0 the annotator likes what the judge likes.
      annotator_noise: divides the difference of utilities that the annotator sees. With 0 the better response is always
        preferred; the more, the nearer to chance.
      sampling: how the policy answers.
      batch_size: prompts answered at once.
    """

    count: int = bounded(2000, at_least(1))
    ideal_share: float = bounded(0.0, at_least(0), at_most(1))
    annotator_bias: float = bounded(1.0, at_least(0), finite)
    annotator_noise: float = bounded(1.0, at_least(0), finite)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=64, temperature=1.0))
    batch_size: int = bounded(256, at_least(1))

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What the configs of all stages have.

    Attributes:
      algorithm: name of the stage in `STAGES`.
      run_dir: folder of the run; all that it writes is in it. A pipeline fills in that of its stages.
      on_existing: a folder that already holds this run is continued (``resume``), put aside and started anew
        (``restart``) or refused (``error``). A restart that was stopped is continued by the same command.
      seed: of everything random: initial parameters, order of the data, sampling.
    """

    algorithm: ClassVar[str] = ""
    run_dir: str = ""
    on_existing: OnExisting = "resume"
    seed: int = bounded(0, at_least(0), below(2**32))
    mesh: MeshConfig = field(default_factory=MeshConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def explain_unknown(cls, name: str) -> str | None:
        """What to say of a field that this stage has not, by dotted name; None where no stage has it."""
        if name == "algorithm":
            classes = ", ".join(stage.config_class.__name__ for stage in STAGES.values())
            return f"is {cls.algorithm} by the class of the config; the classes are {classes}"
        owners = [stage.name for stage in STAGES.values() if _has_field(stage.config_class, name)]
        return f"is a field of {', '.join(owners)}; this is a run of {cls.algorithm}" if owners else None


@dataclass(frozen=True, kw_only=True)
class ModelStageConfig(StageConfig):
    """What the configs of the stages have that work with one model on one set of records."""

    model: ModelSource = field(default_factory=ModelSource)
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(ModelStageConfig):
    """What the configs of the stages that train have.

    Attributes:
      num_steps: updates in all, in PPO rollouts, or None for ``num_epochs``.
      num_epochs: passes over the data, where ``num_steps`` is None.
      num_microbatches: parts that a batch is cut into, to save memory; the update is the same.
      lora: adapters to train in place of the weights, in PPO for policy and critic alike; none by default.
    """

    num_steps: int | None = bounded(None, at_least(1))
    num_epochs: float = bounded(3.0, above(0), finite)
    num_microbatches: int = bounded(1, at_least(1))
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass(frozen=True, kw_only=True)
class SFT(TrainingConfig):
    """Supervised fine-tuning on demonstrations, or on the chosen responses of pairs."""

    algorithm: ClassVar[str] = "sft"
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass(frozen=True, kw_only=True)
class SamplePairs(ModelStageConfig):
    """Preference pairs of an embedded task, sampled from a policy."""

    algorithm: ClassVar[str] = "sample_pairs"
    pairs: PairsConfig = field(default_factory=PairsConfig)


@dataclass(frozen=True, kw_only=True)
class Seq2SeqRM(TrainingConfig):
    """A reward model that rewrites responses."""

    algorithm: ClassVar[str] = "seq2seq_rm"
    mapping: MappingConfig = field(default_factory=MappingConfig)
    reward: RewardKindConfig = field(default_factory=RewardKindConfig)
    evaluation: CorrectionEvaluationConfig = field(default_factory=CorrectionEvaluationConfig)


@dataclass(frozen=True, kw_only=True)
class ScalarRM(TrainingConfig):
    """A reward model with a scalar head."""

    algorithm: ClassVar[str] = "scalar_rm"
    scalar_rm: ScalarRMConfig = field(default_factory=ScalarRMConfig)
    reward: RewardKindConfig = field(default_factory=lambda: RewardKindConfig(kind="scalar"))
    evaluation: RankingEvaluationConfig = field(default_factory=RankingEvaluationConfig)


@dataclass(frozen=True, kw_only=True)
class PPO(TrainingConfig):
    """Proximal policy optimization with token rewards.

    Attributes:
      reward: the source of token rewards.
      rewards: several sources in its place, by name: their token rewards are added.
      ptx: SFT data that PPO mixes in, where it is given.
    """

    algorithm: ClassVar[str] = "ppo"
    reward: RewardConfig = field(default_factory=RewardConfig)
    rewards: Mapping[str, RewardConfig] = field(default_factory=dict)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    ptx: DataConfig | None = None
    evaluation: JudgedEvaluationConfig = field(default_factory=JudgedEvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sources(self)
        check_early_end_penalty(self)


@dataclass(frozen=True, kw_only=True)
class DPO(TrainingConfig):
    """Direct preference optimization."""

    algorithm: ClassVar[str] = "dpo"
    dpo: DPOConfig = field(default_factory=DPOConfig)
    evaluation: JudgedEvaluationConfig = field(default_factory=JudgedEvaluationConfig)


@dataclass(frozen=True, kw_only=True)
class BestOfN(ModelStageConfig):
    """The best of n responses of a policy to each prompt.

    Attributes:
      num_steps: batches of ``data.batch_size`` prompts in all; None takes every prompt.
      num_microbatches: parts that a batch is scored in, to save memory.
      reward: the source of token rewards that chooses.
      rewards: several sources in its place, by name: their token rewards are added.
    """

    algorithm: ClassVar[str] = "best_of_n"
    num_steps: int | None = bounded(None, at_least(1))
    num_microbatches: int = bounded(1, at_least(1))
    reward: RewardConfig = field(default_factory=RewardConfig)
    rewards: Mapping[str, RewardConfig] = field(default_factory=dict)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    best_of_n: BestOfNConfig = field(default_factory=BestOfNConfig)
    evaluation: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sources(self)


@dataclass(frozen=True, kw_only=True)
class Evaluate(ModelStageConfig):
    """Answers of a policy, judged and scored.

    Attributes:
      num_microbatches: parts that a batch is scored in, to save memory.
      reward: the source of token rewards, where there is one.
      rewards: several sources in its place, by name: their token rewards are added.
    """

    algorithm: ClassVar[str] = "evaluate"
    num_microbatches: int = bounded(1, at_least(1))
    reward: RewardConfig = field(default_factory=RewardConfig)
    rewards: Mapping[str, RewardConfig] = field(default_factory=dict)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    evaluation: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sources(self)


@dataclass(frozen=True, kw_only=True)
class Compare(StageConfig):
    """Policies compared on prompts, by judges. All that was answered or judged is found again, whatever is added.

    Attributes:
      policies: two or more, by name; the first is the one that others are compared with.
      prompts: sets of prompts, by name.
      judges: by name; without one, only what can be counted is compared.
    """

    algorithm: ClassVar[str] = "compare"
    policies: Mapping[str, ComparedPolicyConfig] = field(default_factory=dict)
    prompts: Mapping[str, PromptSetConfig] = field(default_factory=dict)
    judges: Mapping[str, ComparisonJudgeConfig] = field(default_factory=dict)
    compare: CompareConfig = field(default_factory=CompareConfig)


class StageRow(NamedTuple):
    """A row of the table of stages.

    Attributes:
      name: of the stage.
      config_class: of its config.
      module: that runs it, by its function ``run(config)``.
      phrase: what it is called in reports.
      holds: what its runs hold: ``policy``, ``seq2seq reward model``, ``scalar reward model``, or nothing.
      is_planned: whether `jaxrm.plan` can compile it.
    """

    name: str
    config_class: type[StageConfig]
    module: str
    phrase: str
    holds: str | None = None
    is_planned: bool = False


_SCALAR, _SEQ2SEQ = "scalar reward model", "seq2seq reward model"
_REWARD_MODEL = "jaxrm.stages.reward_model.run"
STAGES = {
    row.name: row
    for row in (
        StageRow("sft", SFT, "jaxrm.stages.sft", "supervised fine-tuning", "policy", is_planned=True),
        StageRow("sample_pairs", SamplePairs, "jaxrm.stages.sample_pairs", "preference pairs sampled from a policy"),
        StageRow("seq2seq_rm", Seq2SeqRM, _REWARD_MODEL, "seq2seq reward model", _SEQ2SEQ, is_planned=True),
        StageRow("scalar_rm", ScalarRM, _REWARD_MODEL, "scalar reward model", _SCALAR, is_planned=True),
        StageRow("ppo", PPO, "jaxrm.stages.ppo.run", "PPO", "policy", is_planned=True),
        StageRow("dpo", DPO, "jaxrm.stages.dpo.run", "direct preference optimization", "policy", is_planned=True),
        StageRow("best_of_n", BestOfN, "jaxrm.stages.best_of_n.run", "best of n responses"),
        StageRow("evaluate", Evaluate, "jaxrm.stages.evaluate.run", "answers to test prompts"),
        StageRow("compare", Compare, "jaxrm.stages.compare.run", "policies compared"),
    )
}


def stages_that_hold(*contents: str) -> tuple[str, ...]:
    """Names of the stages whose runs hold one of ``contents`` (see `StageRow`)."""
    return tuple(row.name for content in contents for row in STAGES.values() if row.holds == content)


POLICIES = stages_that_hold("policy")
LANGUAGE_MODELS = stages_that_hold("policy", "seq2seq reward model")  # a whole decoder
REWARD_MODELS = (*stages_that_hold("seq2seq reward model", "scalar reward model"), "dpo")  # whose policy scores too
CRITIC_TRUNKS = stages_that_hold("scalar reward model", "policy")
PLANNED = tuple(row.name for row in STAGES.values() if row.is_planned)


def read_stage(recorded: Mapping[str, Any], where: str = "config") -> Any:
    """The config of a run from its ``run.json``, also of one that was made before each stage had a class of its own.

    Args:
      recorded: as `jaxrm.config.dicts.to_dict` gave it.
      where: its dotted name in messages.

    Raises:
      UserError: where it is no config of a stage.
    """
    name = recorded.get("algorithm")
    if not isinstance(name, str) or name not in STAGES:
        raise UserError(f"{where}.algorithm is {name!r}, which is no stage; the stages are {', '.join(STAGES)}")
    config_class = STAGES[name].config_class
    return dicts.from_dict(config_class, upgraded(recorded, dicts.to_dict(config_class())), where)


def _has_field(config_class: type[StageConfig], name: str) -> bool:
    name_of_flag = f"--config.{name}="
    names = field_names.field_names(
        config_class, named=typed_names([name_of_flag], field_names.named_fields(config_class))
    )
    return any(known == f"config.{name}" or known.startswith(f"config.{name}.") for known in names)
