"""GRPO of Llama 2 7B with the token rewards of its seq2seq reward model: no critic, groups of 8 responses.

    python -m jaxrm.train --config=configs/grpo_llama_2_7b.py --config.mesh.fsdp=8

Needs: the runs of `configs/sft_llama_2_7b.py` and `configs/rm_seq2seq_llama_2_7b.py` (or other folders, as
--config.model.path and --config.reward.model). Memory: 16 bytes a parameter for the policy, 2 for reference and reward
model, and activations. That is 135 GB spread over the fsdp axis, where PPO needs 240. A step answers 16 prompts, so the
data and fsdp axes have at most 16 devices; more take --config.data.batch_size. Aggregation, KL coefficient and learning
rate are those of DeepSeekMath (arXiv 2402.03300), whose groups had 64 responses; sizes are those of
`configs/ppo_llama_2_7b.py`.
"""

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.sharding.mesh import MeshConfig
from jaxrm.stage_config import PPO


def get_config() -> PPO:
    sampling = SamplingConfig(max_new_tokens=512)
    return PPO(
        run_dir="runs/grpo_llama_2_7b",
        num_epochs=1.0,
        reward=RewardConfig(kind="literal", model="runs/rm_seq2seq_llama_2_7b"),
        model=ModelSource(path="runs/sft_llama_2_7b", dtype="bfloat16"),
        data=DataConfig(
            path="PKU-Alignment/PKU-SafeRLHF", template="llama2", max_length=1024, batch_size=128, max_eval_records=256
        ),
        rollout=RolloutConfig(sampling=sampling, mesh=MeshConfig(data=-1), responses_per_prompt=8),
        ppo=PPOConfig(advantage="grpo", loss_aggregation="sequence", kl_coef=0.04),
        optimizer=OptimizerConfig(lr=1e-6, schedule="constant", warmup=0.03, b1=0.9, b2=0.95, clip_norm=1.0),
        evaluation=JudgedEvaluationConfig(every=50, samples=8, sampling=sampling),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
