"""GRPO on the embedded task: PPO without a critic, whose token rewards are compared within groups of 8 responses.

    python -m jaxrm.train --config=configs/grpo_tiny.py

Needs: the policy, `configs/sft_tiny.py`, and a reward model, `configs/rm_seq2seq_tiny.py`; two CPU cores, 2 GB of
memory, about two minutes. As in the paper (arXiv 2402.03300), the KL to the reference is a term of the loss, and losses
are averaged over each response first. The coefficient, the learning rate and the size of a group are jaxrm's choice for
a model of this size. With a scalar reward model instead: --config.reward.kind=scalar
--config.reward.model=runs/rm_scalar_tiny --config.run_dir=runs/grpo_scalar_tiny
"""

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.stage_config import PPO


def get_config() -> PPO:
    sampling = SamplingConfig(max_new_tokens=40)
    return PPO(
        run_dir="runs/grpo_tiny",
        num_steps=50,
        reward=RewardConfig(kind="literal", model="runs/rm_seq2seq_tiny"),
        model=ModelSource(path="runs/sft_tiny"),
        data=DataConfig(path="task:safety", max_length=64, batch_size=64),
        rollout=RolloutConfig(sampling=sampling, responses_per_prompt=8),
        ppo=PPOConfig(advantage="grpo", loss_aggregation="sequence", kl_coef=0.3),
        optimizer=OptimizerConfig(lr=1e-4),
        evaluation=JudgedEvaluationConfig(every=25, sampling=sampling),
    )
