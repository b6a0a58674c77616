"""The whole method on the embedded task: SFT, pairs, both reward models, PPO with each, and who wins, in one page.

    ./launch/quickstart.sh
    python -m jaxrm.train --config=configs/quickstart.py

Needs: two CPU cores, 2 GB of memory, about six minutes. Any field of any stage can be overridden, e.g.
--config.ppo_seq2seq.reward.kind=soft; each stage's run is in runs/quickstart/STAGE, the page in runs/quickstart.
"""

from dataclasses import replace

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.comparison_config import CompareConfig, ComparedPolicyConfig, ComparisonJudgeConfig, PromptSetConfig
from jaxrm.data.config import DataConfig
from jaxrm.data.pairs import MappingConfig
from jaxrm.evaluation.config import CorrectionEvaluationConfig, JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.pipeline.config import Pipeline, pipeline
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.stage_config import PPO, SFT, Compare, PairsConfig, SamplePairs, ScalarRM, Seq2SeqRM

POLICY, PAIRS = ModelSource(path="stage:sft"), "stage:pairs/pairs.jsonl"
SAMPLING = SamplingConfig(max_new_tokens=40)


def get_config() -> Pipeline:
    sft = SFT(
        num_epochs=4.0,
        model=ModelSource(preset="tiny"),
        data=DataConfig(path="task:safety", max_length=256, batch_size=16),
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.1),
    )
    pairs = SamplePairs(
        model=POLICY,
        data=DataConfig(path="task:safety"),
        pairs=PairsConfig(count=2000, sampling=SAMPLING),
    )
    preferences = DataConfig(path=PAIRS, max_length=256, batch_size=16, eval_share=0.1)
    rm_scalar = ScalarRM(
        num_epochs=2.0, model=POLICY, data=preferences, optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1)
    )
    rm_seq2seq = Seq2SeqRM(
        num_epochs=2.0,
        # In a world of 198 words the turn alone is instruction enough. The weight has its evidence in jaxrm/study.
        mapping=MappingConfig(instruction="", edit_weight=4.0),
        model=POLICY,
        data=preferences,
        optimizer=rm_scalar.optimizer,
        evaluation=CorrectionEvaluationConfig(judge="task:safety"),
    )
    ppo_scalar = PPO(
        num_steps=100,
        reward=RewardConfig(kind="scalar", model="stage:rm_scalar"),
        model=POLICY,
        data=DataConfig(path="task:safety", max_length=64, batch_size=32, max_eval_records=256),
        rollout=RolloutConfig(sampling=SAMPLING),
        ppo=PPOConfig(kl_coef=0.02),  # as published
        critic=CriticConfig(path="stage:rm_scalar", optimizer=OptimizerConfig(lr=3e-4)),
        optimizer=OptimizerConfig(lr=3e-4),
        evaluation=JudgedEvaluationConfig(every=25, samples=8, sampling=SAMPLING),
        logging=LoggingConfig(every=1),
    )
    ppo_seq2seq = replace(
        ppo_scalar,
        reward=RewardConfig(kind="literal", model="stage:rm_seq2seq"),
        ppo=replace(ppo_scalar.ppo, early_end_penalty=1.0),  # of an end that the reward model would not have written
    )
    compare = Compare(
        policies={name: ComparedPolicyConfig(path=f"stage:{name}") for name in ("sft", "ppo_scalar", "ppo_seq2seq")},
        prompts={"heldout": PromptSetConfig(path="task:safety", max_prompts=128)},
        judges={
            "exact": ComparisonJudgeConfig(function="task:safety"),
            "rm_scalar": ComparisonJudgeConfig(reward_model="stage:rm_scalar"),
            "rm_seq2seq": ComparisonJudgeConfig(reward_model="stage:rm_seq2seq"),
        },
        compare=CompareConfig(
            decodings=("sampled",), sampling=SAMPLING, batch_size=64, reference="stage:sft", token_rewards=8
        ),
    )
    return pipeline(
        run_dir="runs/quickstart",
        sft=sft,
        pairs=pairs,
        rm_scalar=rm_scalar,
        rm_seq2seq=rm_seq2seq,
        ppo_scalar=ppo_scalar,
        ppo_seq2seq=ppo_seq2seq,
        compare=compare,
    )
