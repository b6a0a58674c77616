"""RTO on the embedded task: PPO with a sum of rewards, the scalar reward model's at the end and DPO's at every token.

    python -m jaxrm.train --config=configs/ppo_rto_tiny.py

Needs: the policy, `configs/sft_tiny.py`, what DPO made of it, `configs/dpo_tiny.py`, and a scalar reward model,
`configs/rm_scalar_tiny.py`; two CPU cores, 2 GB of memory, about three minutes. The sum is that of Reinforced Token
Optimization (arXiv 2404.18922). Both sources have unit standard deviation over a response. The weight of DPO's is
jaxrm's choice: with 1, 25 of the 50 steps taught to refuse harmless prompts (configs/README.md).
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
        run_dir="runs/ppo_rto_tiny",
        num_steps=50,
        rewards={
            "preference": RewardConfig(kind="scalar", model="runs/rm_scalar_tiny"),
            "dense": RewardConfig(weight=0.2, kind="dpo", model="runs/dpo_tiny"),
        },
        model=ModelSource(path="runs/sft_tiny"),
        data=DataConfig(path="task:safety", max_length=64, batch_size=64),
        rollout=RolloutConfig(sampling=sampling),
        ppo=PPOConfig(kl_coef=0.3),
        critic=CriticConfig(optimizer=OptimizerConfig(lr=3e-4)),
        optimizer=OptimizerConfig(lr=1e-4),
        evaluation=JudgedEvaluationConfig(every=25, sampling=sampling),
    )
