"""SFT of a 1 M-parameter Llama on the embedded task, in plain English and without a download.

    python -m jaxrm.train --config=configs/sft_tiny.py

Needs: two CPU cores, 2 GB of memory, about a minute. It is the first stage of `configs/quickstart.py`, alone.
"""

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import EvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.stage_config import SFT


def get_config() -> SFT:
    return SFT(
        run_dir="runs/sft_tiny",
        num_epochs=4.0,
        model=ModelSource(preset="tiny"),
        data=DataConfig(path="task:safety", max_length=256, batch_size=16),
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=50),
        evaluation=EvaluationConfig(every=50),
    )
