"""Preference pairs of the embedded task: responses of the SFT policy, labeled by the task's annotator.

    python -m jaxrm.train --config=configs/pairs_tiny.py

Needs: the policy, `configs/sft_tiny.py`; two CPU cores, 2 GB of memory, about a minute. The annotator is noisy and
likes refusals too much.
"""

from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.stage_config import PairsConfig, SamplePairs


def get_config() -> SamplePairs:
    return SamplePairs(
        run_dir="runs/pairs_tiny",
        model=ModelSource(path="runs/sft_tiny"),
        data=DataConfig(path="task:safety"),
        pairs=PairsConfig(count=2000),
    )
