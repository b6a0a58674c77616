"""PPO with adapters (LoRA): policy, critic, reference and reward model stand on one Gemma 2B in memory.

    python -m jaxrm.train --config=configs/ppo_lora_gemma_2b.py

Needs: the runs of `configs/sft_lora_gemma_2b.py` and `configs/rm_seq2seq_lora_gemma_2b.py` (or other folders, as
--config.model.path and --config.reward.model; the reward model takes no memory of its own where it stands on the same
base). By `jaxrm.plan` one H100 is enough: 14.4 GiB of 59 and about 7.6 s a step. Learning rates are ten times those of
`configs/ppo_gemma_2b.py`, the factor that LoRA Without Regret (Schulman et al. 2025) found, with its alpha. The rest is
as there, in microbatches. For the baseline add --config.reward.kind=scalar
--config.reward.model=runs/rm_scalar_lora_gemma_2b --config.run_dir=runs/ppo_scalar_lora_gemma_2b.
"""

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import LoRAConfig
from jaxrm.models.sampling import SamplingConfig
from jaxrm.sharding.mesh import MeshConfig
from jaxrm.stage_config import PPO

DATA = "PKU-Alignment/PKU-SafeRLHF"


def get_config() -> PPO:
    sampling = SamplingConfig(max_new_tokens=512)
    return PPO(
        run_dir="runs/ppo_lora_gemma_2b",
        num_epochs=1.0,
        num_microbatches=4,
        # No kind beat the paper's in the study, and centering is worth most (jaxrm/study/README.md).
        reward=RewardConfig(kind="literal", model="runs/rm_seq2seq_lora_gemma_2b"),
        model=ModelSource(path="runs/sft_lora_gemma_2b", dtype="bfloat16"),
        lora=LoRAConfig(rank=16, alpha=32.0),
        data=DataConfig(path=DATA, template="gemma", max_length=1024, batch_size=64, max_eval_records=256),
        ptx=DataConfig(path=DATA, max_length=1024, batch_size=64),
        rollout=RolloutConfig(sampling=sampling, mesh=MeshConfig(data=1, tensor=-1), num_microbatches=4),
        ppo=PPOConfig(kl_coef=0.02, clip=0.2, value_clip=5.0, reward_clip=50.0, gae_lambda=0.95, ptx_coef=16.0),
        critic=CriticConfig(optimizer=OptimizerConfig(lr=5e-5, warmup=0.03, b1=0.9, b2=0.95, clip_norm=1.0)),
        optimizer=OptimizerConfig(lr=1e-4, schedule="cosine", warmup=0.03, b1=0.9, b2=0.95, clip_norm=1.0),
        evaluation=JudgedEvaluationConfig(every=50, samples=8, sampling=sampling),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
