"""SFT of Llama 2 7B with adapters (LoRA): the first stage of the paper's recipe on one accelerator.

    python -m jaxrm.train --config=configs/sft_lora_llama_2_7b.py

Needs: an account that may download meta-llama/Llama-2-7b-hf (or --config.model.path=FOLDER). By `jaxrm.plan` one H100
is enough: 17.0 GiB of 59 and about 2.6 s a step. The learning rate is ten times that of `configs/sft_llama_2_7b.py`,
the factor that LoRA Without Regret (Schulman et al. 2025) found, with its alpha. The rest is as there.
"""

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import LoRAConfig
from jaxrm.sharding.mesh import MeshConfig
from jaxrm.stage_config import SFT


def get_config() -> SFT:
    return SFT(
        run_dir="runs/sft_lora_llama_2_7b",
        num_epochs=3.0,
        num_microbatches=8,
        model=ModelSource(path="meta-llama/Llama-2-7b-hf", dtype="bfloat16"),
        lora=LoRAConfig(rank=16, alpha=32.0),
        data=DataConfig(path="PKU-Alignment/PKU-SafeRLHF", template="llama2", max_length=1024, batch_size=64),
        optimizer=OptimizerConfig(lr=2e-4, schedule="cosine", warmup=0.03, b1=0.9, b2=0.95, clip_norm=1.0),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
