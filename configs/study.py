"""Which reward, with which settings, and what happens if they are wrong? Three small worlds with an exact judge.

    python -m jaxrm.train --config=configs/study.py --dry_run
    python -m jaxrm.train --config=configs/study.py
    python -m jaxrm.train --config=configs/study.py --config.preset=smoke

Needs: 4 GB of memory, and hours of CPU cores, which the dry run and the first line say. The smoke preset takes two
minutes. It can be stopped at any time; the same command continues. Parts of it: --config.worlds=safety
--config.arms=ppo_scalar,ppo_literal. Other settings of a stage: --config.ppo.num_steps=320. Your own kind of reward:
--config.arms=ppo_scalar,ppo_my_kinds:doubt
"""

from dataclasses import replace

from jaxrm.algorithms.best_of_n import BestOfNConfig
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.data.config import DataConfig
from jaxrm.data.pairs import MappingConfig
from jaxrm.evaluation.config import (
    CorrectionEvaluationConfig,
    EvaluationConfig,
    JudgedEvaluationConfig,
    RankingEvaluationConfig,
)
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.stage_config import DPO, PPO, SFT, BestOfN, Evaluate, PairsConfig, SamplePairs, ScalarRM, Seq2SeqRM
from jaxrm.study.config import Study

SAMPLING = SamplingConfig(max_new_tokens=28)


def get_config() -> Study:
    never, quiet = 10_000, LoggingConfig(progress=False)
    checkpoint = CheckpointConfig(every=never)
    optimizer = OptimizerConfig(lr=1.5e-3, weight_decay=0.1)
    demonstrations = DataConfig(max_length=256, batch_size=2, max_eval_records=128)
    pairs = DataConfig(max_length=256, batch_size=4, eval_share=0.1)
    prompts = DataConfig(max_length=60, batch_size=32, max_eval_records=256)
    rollout = RolloutConfig(sampling=SAMPLING)
    sft = SFT(
        model=ModelSource(remat="none"),  # of every run: there is room for all activations
        num_steps=3000,
        data=demonstrations,
        optimizer=optimizer,
        evaluation=EvaluationConfig(every=never, samples=0, sampling=SAMPLING),
        checkpoint=checkpoint,
        logging=quiet,
    )
    rm_scalar = ScalarRM(
        data=pairs,
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1),
        evaluation=RankingEvaluationConfig(every=never),
        checkpoint=checkpoint,
        logging=quiet,
    )
    imitation = replace(
        sft,
        num_steps=None,
        num_epochs=2.0,
        data=replace(demonstrations, batch_size=8),
        optimizer=replace(optimizer, lr=1e-3),
    )
    return Study(
        run_dir="runs/study",
        max_notes=10,  # with 7, all arms are at the ceiling of summarize
        sft=sft,
        pairs=SamplePairs(data=demonstrations, pairs=PairsConfig(count=2000, sampling=SAMPLING), logging=quiet),
        rm_scalar=rm_scalar,
        rm_seq2seq=Seq2SeqRM(
            mapping=MappingConfig(instruction="", edit_weight=4.0),
            data=pairs,
            optimizer=rm_scalar.optimizer,
            evaluation=CorrectionEvaluationConfig(every=never, samples=0, sampling=SAMPLING),
            checkpoint=checkpoint,
            logging=quiet,
        ),
        imitation=imitation,
        dpo=DPO(
            num_epochs=1.0,
            data=replace(demonstrations, batch_size=8),
            optimizer=imitation.optimizer,
            evaluation=JudgedEvaluationConfig(every=never, samples=0, sampling=SAMPLING),
            checkpoint=checkpoint,
            logging=quiet,
        ),
        best_of_n=BestOfN(data=prompts, rollout=rollout, best_of_n=BestOfNConfig(n=8), logging=quiet),
        ppo=PPO(
            num_steps=160,
            data=replace(prompts, max_eval_records=128),
            rollout=rollout,
            ppo=PPOConfig(kl_coef=0.02),
            critic=CriticConfig(optimizer=OptimizerConfig(lr=1e-3)),
            optimizer=OptimizerConfig(lr=1e-3),
            evaluation=JudgedEvaluationConfig(every=16, samples=8, sampling=SAMPLING),
            checkpoint=checkpoint,
            logging=quiet,
        ),
        evaluate=Evaluate(data=replace(prompts, batch_size=256), rollout=rollout, logging=quiet),
    )
