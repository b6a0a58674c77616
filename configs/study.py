"""Is language feedback better than a scalar? Three small worlds with an exact judge, every arm tuned alike, one report.

    python -m jaxrm.train --config=configs/study.py
    python -m jaxrm.train --config=configs/study.py --config.preset=smoke

Needs: two CPU cores, 4 GB of memory, about two hours; the smoke preset takes two minutes. It can be stopped at any
time; the same command continues. Parts of it: --config.worlds=safety --config.arms=ppo_scalar,ppo_literal. Other
settings of a stage: --config.ppo.num_steps=100. Your own kind of reward: --config.arms=ppo_scalar,ppo_my_kinds:doubt
"""

from dataclasses import replace

from jaxrm.algorithms.best_of_n import BestOfNConfig
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.data.pairs import MappingConfig
from jaxrm.experiment import EvaluationConfig, Experiment, PairsConfig
from jaxrm.models.generate import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.study.config import Study

SAMPLING = SamplingConfig(max_new_tokens=28)


def get_config() -> Study:
    sft = Experiment(
        algorithm="sft",
        num_steps=3000,
        data=DataConfig(max_length=256, batch_size=2, max_eval_records=128),
        optimizer=OptimizerConfig(lr=1.5e-3, weight_decay=0.1),
        evaluation=EvaluationConfig(every=10_000, samples=0, sampling=SAMPLING),
        checkpoint=CheckpointConfig(every=10_000),
        logging=LoggingConfig(progress=False),
    )
    rm_scalar = replace(
        sft,
        algorithm="scalar_rm",
        num_steps=None,
        num_epochs=3.0,
        reward=RewardConfig(kind="scalar"),
        data=DataConfig(max_length=256, batch_size=4, eval_share=0.1),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1),
    )
    prompts = DataConfig(max_length=60, batch_size=32, max_eval_records=256)
    ppo = replace(
        sft,
        algorithm="ppo",
        num_steps=48,
        data=prompts,
        rollout=RolloutConfig(sampling=SAMPLING),
        ppo=PPOConfig(missing_end_penalty=1.0),
        critic=CriticConfig(optimizer=OptimizerConfig(lr=1e-3)),
        optimizer=OptimizerConfig(lr=1e-3),
        evaluation=EvaluationConfig(every=12, samples=8, sampling=SAMPLING),
    )
    return Study(
        run_dir="runs/study",
        sft=sft,
        pairs=replace(sft, algorithm="sample_pairs", pairs=PairsConfig(count=2000, sampling=SAMPLING)),
        rm_scalar=rm_scalar,
        rm_seq2seq=replace(rm_scalar, algorithm="seq2seq_rm", mapping=MappingConfig(instruction="")),
        imitation=replace(sft, num_steps=None, num_epochs=2.0, data=replace(sft.data, batch_size=8)),
        dpo=replace(sft, algorithm="dpo", num_steps=None, num_epochs=1.0, data=replace(sft.data, batch_size=8)),
        best_of_n=replace(ppo, algorithm="best_of_n", num_steps=None, best_of_n=BestOfNConfig(n=8)),
        ppo=ppo,
        evaluate=replace(ppo, algorithm="evaluate", data=replace(prompts, batch_size=256)),
    )
