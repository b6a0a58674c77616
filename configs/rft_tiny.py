"""Rejection sampling fine-tuning on the embedded task: best of 8 by the seq2seq reward model, then SFT on the winners.

    python -m jaxrm.train --config=configs/rft_tiny.py

Needs: the policy, `configs/sft_tiny.py`, and a reward model, `configs/rm_seq2seq_tiny.py`; two CPU cores, 2 GB of
memory, about a minute. With a scalar reward model instead: --config.winners.reward.kind=scalar
--config.winners.reward.model=runs/rm_scalar_tiny --config.run_dir=runs/rft_scalar_tiny
"""

from jaxrm.algorithms.best_of_n import BestOfNConfig
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import EvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.pipeline.config import Pipeline, pipeline
from jaxrm.stage_config import SFT, BestOfN

POLICY = ModelSource(path="runs/sft_tiny")


def get_config() -> Pipeline:
    winners = BestOfN(
        reward=RewardConfig(kind="soft", model="runs/rm_seq2seq_tiny"),
        model=POLICY,
        data=DataConfig(path="task:safety", max_length=64, batch_size=256),
        best_of_n=BestOfNConfig(n=8),
        rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=40)),
    )
    sft = SFT(
        num_epochs=2.0,
        model=POLICY,
        data=DataConfig(path="stage:winners/winners.jsonl", max_length=256, batch_size=16),
        optimizer=OptimizerConfig(lr=5e-4),
        evaluation=EvaluationConfig(every=50),
    )
    return pipeline(run_dir="runs/rft_tiny", winners=winners, sft=sft)
