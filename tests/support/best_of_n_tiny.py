"""Best of n alone: the first stage of `configs/rft_tiny.py`, smaller."""

from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.stage_config import BestOfN


def get_config() -> BestOfN:
    return BestOfN(
        run_dir="runs/best_of_n_tiny",
        reward=RewardConfig(kind="soft", model="runs/rm_seq2seq_tiny"),
        model=ModelSource(path="runs/sft_tiny"),
        data=DataConfig(path="task:safety"),
    )
