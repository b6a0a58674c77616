"""PPO on the embedded task with the seq2seq reward model's token rewards.

    python -m jaxrm.train --config=configs/ppo_tiny.py

Needs: the policy, `configs/sft_tiny.py`, and a reward model, `configs/rm_seq2seq_tiny.py`; two CPU cores, 2 GB of
memory, about a minute. With a scalar reward model instead:
--config.reward.kind=scalar --config.reward.model=runs/rm_scalar_tiny --config.run_dir=runs/ppo_scalar_tiny
"""

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.stage_config import PPO


def get_config() -> PPO:
    sampling = SamplingConfig(max_new_tokens=40)
    return PPO(
        run_dir="runs/ppo_tiny",
        num_steps=100,
        # No kind beat the paper's in the study, and centering is worth most (jaxrm/study/README.md).
        reward=RewardConfig(kind="literal", model="runs/rm_seq2seq_tiny"),
        model=ModelSource(path="runs/sft_tiny"),
        data=DataConfig(path="task:safety", max_length=64, batch_size=32),
        rollout=RolloutConfig(sampling=sampling),
        ppo=PPOConfig(kl_coef=0.02),  # as published
        critic=CriticConfig(optimizer=OptimizerConfig(lr=3e-4)),
        optimizer=OptimizerConfig(lr=3e-4),
        evaluation=JudgedEvaluationConfig(every=25, sampling=sampling),
    )
