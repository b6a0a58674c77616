"""RLOO on the embedded task: PPO without a critic, whose baseline is the mean of the other responses to the prompt.

    python -m jaxrm.train --config=configs/rloo_tiny.py

Needs: the policy, `configs/sft_tiny.py`, and a reward model, `configs/rm_seq2seq_tiny.py`; two CPU cores, 2 GB of
memory, a minute and a half. As in REINFORCE with a leave-one-out baseline (arXiv 2402.14740), the KL to the reference
is taken off the rewards. Every token weighs alike, whatever the length of its response. KL coefficient, learning rate
and steps are jaxrm's choice. With a scalar reward model instead: --config.reward.kind=scalar
--config.reward.model=runs/rm_scalar_tiny --config.run_dir=runs/rloo_scalar_tiny
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
        run_dir="runs/rloo_tiny",
        num_steps=50,
        reward=RewardConfig(kind="literal", model="runs/rm_seq2seq_tiny"),
        model=ModelSource(path="runs/sft_tiny"),
        data=DataConfig(path="task:safety", max_length=64, batch_size=64),
        rollout=RolloutConfig(sampling=sampling, responses_per_prompt=4),
        ppo=PPOConfig(advantage="rloo", loss_aggregation="constant", kl_coef=0.3),
        optimizer=OptimizerConfig(lr=1e-4),
        evaluation=JudgedEvaluationConfig(every=25, sampling=sampling),
    )
