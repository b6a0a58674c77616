"""RLOO with adapters (LoRA): policy, reference and reward model stand on one Llama 2 7B in memory; there is no critic.

    python -m jaxrm.train --config=configs/rloo_lora_llama_2_7b.py

Needs: the runs of `configs/sft_lora_llama_2_7b.py` and `configs/rm_seq2seq_lora_llama_2_7b.py` (or other folders, as
--config.model.path and --config.reward.model; the reward model takes no memory of its own where it stands on the same
base). A step answers 16 prompts, 8 times each, so the data and fsdp axes have at most 16 devices. Every token weighs
alike, as in REINFORCE with a leave-one-out baseline (arXiv 2402.14740). KL coefficient and learning rate are jaxrm's
choice. Sizes are those of `configs/ppo_lora_llama_2_7b.py`.
"""

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import LoRAConfig
from jaxrm.models.sampling import SamplingConfig
from jaxrm.sharding.mesh import MeshConfig
from jaxrm.stage_config import PPO


def get_config() -> PPO:
    sampling = SamplingConfig(max_new_tokens=512)
    return PPO(
        run_dir="runs/rloo_lora_llama_2_7b",
        num_epochs=1.0,
        num_microbatches=8,
        reward=RewardConfig(kind="literal", model="runs/rm_seq2seq_lora_llama_2_7b"),
        model=ModelSource(path="runs/sft_lora_llama_2_7b", dtype="bfloat16"),
        lora=LoRAConfig(rank=16, alpha=32.0),
        data=DataConfig(
            path="PKU-Alignment/PKU-SafeRLHF", template="llama2", max_length=1024, batch_size=128, max_eval_records=256
        ),
        rollout=RolloutConfig(
            sampling=sampling, mesh=MeshConfig(data=1, tensor=-1), num_microbatches=2, responses_per_prompt=8
        ),
        ppo=PPOConfig(advantage="rloo", loss_aggregation="constant", kl_coef=0.03),
        optimizer=OptimizerConfig(lr=1e-5, schedule="constant", warmup=0.03, b1=0.9, b2=0.95, clip_norm=1.0),
        evaluation=JudgedEvaluationConfig(every=50, samples=8, sampling=sampling),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
