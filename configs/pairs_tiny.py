"""Preference pairs of the embedded task: responses of the SFT policy, labeled by the task's annotator.

    python -m jaxrm.train --config=configs/pairs_tiny.py

Needs: the policy, `configs/sft_tiny.py`; two CPU cores, 2 GB of memory, about a minute. The annotator is noisy and
likes refusals too much.
"""

from jaxrm.data.config import DataConfig
from jaxrm.experiment import Experiment, PairsConfig
from jaxrm.models.build import ModelSource


def get_config() -> Experiment:
    return Experiment(
        run_dir="runs/pairs_tiny",
        algorithm="sample_pairs",
        model=ModelSource(path="runs/sft_tiny"),
        data=DataConfig(path="task:safety"),
        pairs=PairsConfig(count=2000),
    )
