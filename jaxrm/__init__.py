"""jaxrm: RLHF in JAX with reward models that answer in language.

The names here are the public surface. They are imported when they are first used, so that ``import jaxrm`` is quick
and starts no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrm.algorithms.best_of_n import BestOfNConfig as BestOfNConfig
    from jaxrm.algorithms.dpo import DPOConfig as DPOConfig
    from jaxrm.algorithms.endpoint_config import EndpointConfig as EndpointConfig
    from jaxrm.algorithms.optimizer import OptimizerConfig as OptimizerConfig
    from jaxrm.algorithms.ppo_config import CriticConfig as CriticConfig
    from jaxrm.algorithms.ppo_config import PPOConfig as PPOConfig
    from jaxrm.algorithms.ppo_config import RolloutConfig as RolloutConfig
    from jaxrm.algorithms.reward_config import ClassifierConfig as ClassifierConfig
    from jaxrm.algorithms.reward_config import RewardConfig as RewardConfig
    from jaxrm.algorithms.reward_config import RewardKindConfig as RewardKindConfig
    from jaxrm.algorithms.scalar_rm import ScalarRMConfig as ScalarRMConfig
    from jaxrm.comparison_config import CompareConfig as CompareConfig
    from jaxrm.comparison_config import ComparedPolicyConfig as ComparedPolicyConfig
    from jaxrm.comparison_config import ComparisonJudgeConfig as ComparisonJudgeConfig
    from jaxrm.comparison_config import PromptSetConfig as PromptSetConfig
    from jaxrm.data.config import DataConfig as DataConfig
    from jaxrm.data.pairs import MappingConfig as MappingConfig
    from jaxrm.data.records import Message as Message
    from jaxrm.dry_run.run import Check as Check
    from jaxrm.dry_run.run import check as check
    from jaxrm.errors import UserError as UserError
    from jaxrm.evaluation.config import CorrectionEvaluationConfig as CorrectionEvaluationConfig
    from jaxrm.evaluation.config import EvaluateConfig as EvaluateConfig
    from jaxrm.evaluation.config import EvaluationConfig as EvaluationConfig
    from jaxrm.evaluation.config import JudgeConfig as JudgeConfig
    from jaxrm.evaluation.config import JudgedEvaluationConfig as JudgedEvaluationConfig
    from jaxrm.evaluation.config import RankingEvaluationConfig as RankingEvaluationConfig
    from jaxrm.inference import losses as losses
    from jaxrm.inference.batches import comparisons as comparisons
    from jaxrm.inference.batches import demonstrations as demonstrations
    from jaxrm.inference.batches import pairs as pairs
    from jaxrm.inference.classifier import Classifier as Classifier
    from jaxrm.inference.load import load_policy as load_policy
    from jaxrm.inference.load import load_reward_model as load_reward_model
    from jaxrm.inference.policy import Policy as Policy
    from jaxrm.inference.reward_model import RewardModel as RewardModel
    from jaxrm.inference.scores import Scores as Scores
    from jaxrm.inference.training import build_training as build_training
    from jaxrm.models.build import ModelSource as Model  # noqa: F401  # public name
    from jaxrm.models.build import ModelSource as ModelSource
    from jaxrm.models.lora import LoRAConfig as LoRAConfig
    from jaxrm.models.sampling import SamplingConfig as SamplingConfig
    from jaxrm.ops.reward_kinds import reward_kind as reward_kind
    from jaxrm.pipeline.config import Pipeline as Pipeline
    from jaxrm.pipeline.config import pipeline as make_pipeline  # noqa: F401  # public name
    from jaxrm.runtime.checkpoint import CheckpointConfig as CheckpointConfig
    from jaxrm.runtime.metrics import LoggingConfig as LoggingConfig
    from jaxrm.sharding.mesh import MeshConfig as MeshConfig
    from jaxrm.sharding.mesh import build_mesh as build_mesh
    from jaxrm.stage_config import DPO as DPO
    from jaxrm.stage_config import PPO as PPO
    from jaxrm.stage_config import SFT as SFT
    from jaxrm.stage_config import BestOfN as BestOfN
    from jaxrm.stage_config import Compare as Compare
    from jaxrm.stage_config import Evaluate as Evaluate
    from jaxrm.stage_config import PairsConfig as PairsConfig
    from jaxrm.stage_config import SamplePairs as SamplePairs
    from jaxrm.stage_config import ScalarRM as ScalarRM
    from jaxrm.stage_config import Seq2SeqRM as Seq2SeqRM
    from jaxrm.stages.compare.run import compare as compare
    from jaxrm.study.config import Study as Study
    from jaxrm.train import run as run

__version__ = "0.1.0"

# The public names of each module. Editors and mypy read the imports above, which say the same.
_NAMES = {
    "algorithms.best_of_n": ("BestOfNConfig",),
    "algorithms.dpo": ("DPOConfig",),
    "algorithms.endpoint_config": ("EndpointConfig",),
    "algorithms.optimizer": ("OptimizerConfig",),
    "algorithms.ppo_config": (
        "CriticConfig",
        "PPOConfig",
        "RolloutConfig",
    ),
    "algorithms.reward_config": ("ClassifierConfig", "RewardConfig", "RewardKindConfig"),
    "algorithms.scalar_rm": ("ScalarRMConfig",),
    "comparison_config": (
        "CompareConfig",
        "ComparedPolicyConfig",
        "ComparisonJudgeConfig",
        "PromptSetConfig",
    ),
    "data.config": ("DataConfig",),
    "data.pairs": ("MappingConfig",),
    "data.records": ("Message",),
    "dry_run.run": ("Check", "check"),
    "errors": ("UserError",),
    "inference.batches": (
        "comparisons",
        "demonstrations",
        "pairs",
    ),
    "inference.classifier": ("Classifier",),
    "inference.load": (
        "load_policy",
        "load_reward_model",
    ),
    "inference.policy": ("Policy",),
    "inference.reward_model": ("RewardModel",),
    "inference.scores": ("Scores",),
    "inference.training": ("build_training",),
    "models.build": ("ModelSource",),
    "models.lora": ("LoRAConfig",),
    "models.sampling": ("SamplingConfig",),
    "ops.reward_kinds": ("reward_kind",),
    "pipeline.config": ("Pipeline",),
    "runtime.checkpoint": ("CheckpointConfig",),
    "runtime.metrics": ("LoggingConfig",),
    "sharding.mesh": (
        "MeshConfig",
        "build_mesh",
    ),
    "evaluation.config": (
        "CorrectionEvaluationConfig",
        "EvaluateConfig",
        "EvaluationConfig",
        "JudgeConfig",
        "JudgedEvaluationConfig",
        "RankingEvaluationConfig",
    ),
    "stage_config": (
        "BestOfN",
        "Compare",
        "DPO",
        "Evaluate",
        "PPO",
        "PairsConfig",
        "SFT",
        "SamplePairs",
        "ScalarRM",
        "Seq2SeqRM",
    ),
    "stages.compare.run": ("compare",),
    "study.config": ("Study",),
    "train": ("run",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
_RENAMED = {
    "Model": ("models.build", "ModelSource"),
    "losses": ("inference.losses", None),
    "make_pipeline": ("pipeline.config", "pipeline"),
}

__all__ = ["__version__", *sorted({**_MODULES, **_RENAMED})]


def __getattr__(name: str) -> Any:
    module, attribute = _RENAMED.get(name, (_MODULES.get(name), name))
    if module is None:
        raise AttributeError(f"module 'jaxrm' has no attribute {name!r}")
    value: Any = importlib.import_module(f"jaxrm.{module}")
    if attribute is not None:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
