"""Direct preference optimization of Gemma 2B on human preferences, from its SFT policy and without a reward model.

    python -m jaxrm.train --config=configs/dpo_gemma_2b.py --config.mesh.fsdp=8

Needs: the run of `configs/sft_gemma_2b.py` (or another folder, as --config.model.path); 16 bytes a parameter for
parameters, gradients and moments, 40 GB spread over the fsdp axis, and activations. Reference log-probs are computed
once before training, so the reference takes no memory. beta is that of the DPO paper. So are its 64 pairs a step, here
about 32 rows of 2048 tokens. It used RMSprop with 1e-6; Adam's 5e-7 is jaxrm's choice.
"""

from jaxrm.algorithms.dpo import DPOConfig
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.sharding.mesh import MeshConfig
from jaxrm.stage_config import DPO


def get_config() -> DPO:
    return DPO(
        run_dir="runs/dpo_gemma_2b",
        num_epochs=1.0,
        model=ModelSource(path="runs/sft_gemma_2b", dtype="bfloat16"),
        data=DataConfig(path="PKU-Alignment/PKU-SafeRLHF", template="gemma", max_length=2048, batch_size=32),
        dpo=DPOConfig(beta=0.1),
        optimizer=OptimizerConfig(lr=5e-7, schedule="linear", warmup=0.1, b1=0.9, b2=0.999, clip_norm=1.0),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
