"""SFT of Gemma 2B on the chosen responses of human preferences: the first stage of the paper's recipe.

    python -m jaxrm.train --config=configs/sft_gemma_2b.py --config.mesh.fsdp=8

Needs: an account that may download google/gemma-2b (or --config.model.path=FOLDER); 16 bytes a parameter for
parameters, gradients and moments, 40 GB spread over the fsdp axis, and activations. Learning rate, schedule and
epochs are those of the published recipe; batch and length are jaxrm's choice.
"""

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.sharding.mesh import MeshConfig
from jaxrm.stage_config import SFT


def get_config() -> SFT:
    return SFT(
        run_dir="runs/sft_gemma_2b",
        num_epochs=3.0,
        model=ModelSource(path="google/gemma-2b", dtype="bfloat16"),
        data=DataConfig(path="PKU-Alignment/PKU-SafeRLHF", template="gemma", max_length=1024, batch_size=32),
        optimizer=OptimizerConfig(lr=2e-5, schedule="cosine", warmup=0.03, b1=0.9, b2=0.95, clip_norm=1.0),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
