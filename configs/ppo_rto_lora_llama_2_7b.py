"""RTO with adapters (LoRA): PPO of Llama 2 7B whose rewards are the scalar reward model's and DPO's at every token.

    python -m jaxrm.train --config=configs/ppo_rto_lora_llama_2_7b.py

Needs: the runs of `configs/sft_lora_llama_2_7b.py`, of `configs/rm_scalar_lora_llama_2_7b.py`, and of
`configs/dpo_llama_2_7b.py` with --config.model.path=runs/sft_lora_llama_2_7b --config.lora.rank=16
--config.lora.alpha=32 --config.optimizer.lr=5e-6 --config.run_dir=runs/dpo_lora_llama_2_7b. All models stand on one
base, which is in memory once. The sum is that of Reinforced Token Optimization (arXiv 2404.18922); that both sources
have unit standard deviation over a response, and the weight of DPO's, is jaxrm's choice. The rest is as in
`configs/ppo_lora_llama_2_7b.py`.
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
        run_dir="runs/ppo_rto_lora_llama_2_7b",
        num_epochs=1.0,
        num_microbatches=8,
        rewards={
            "preference": RewardConfig(kind="scalar", model="runs/rm_scalar_lora_llama_2_7b"),
            "dense": RewardConfig(weight=0.2, kind="dpo", model="runs/dpo_lora_llama_2_7b"),
        },
        model=ModelSource(path="runs/sft_lora_llama_2_7b", dtype="bfloat16"),
        lora=LoRAConfig(rank=16, alpha=32.0),
        data=DataConfig(path=DATA, template="llama2", max_length=1024, batch_size=128, max_eval_records=256),
        ptx=DataConfig(path=DATA, max_length=1024, batch_size=128),
        rollout=RolloutConfig(sampling=sampling, mesh=MeshConfig(data=1, tensor=-1), num_microbatches=4),
        ppo=PPOConfig(kl_coef=0.02, clip=0.2, value_clip=5.0, reward_clip=50.0, gae_lambda=0.95, ptx_coef=16.0),
        critic=CriticConfig(optimizer=OptimizerConfig(lr=5e-5, warmup=0.03, b1=0.9, b2=0.95, clip_norm=1.0)),
        optimizer=OptimizerConfig(lr=1e-4, schedule="cosine", warmup=0.03, b1=0.9, b2=0.95, clip_norm=1.0),
        evaluation=JudgedEvaluationConfig(every=50, samples=8, sampling=sampling),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
