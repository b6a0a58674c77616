"""Scalar reward model on the embedded task: the Bradley-Terry baseline, from the pairs of `rm_seq2seq_tiny`.

    python -m jaxrm.train --config=configs/rm_scalar_tiny.py

Needs: the policy that it starts from and pairs of that policy's responses, `configs/sft_tiny.py` and then
`configs/pairs_tiny.py`; two CPU cores, 2 GB of memory, about two minutes.
"""

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.reward_config import RewardKindConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import RankingEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.stage_config import ScalarRM


def get_config() -> ScalarRM:
    return ScalarRM(
        run_dir="runs/rm_scalar_tiny",
        num_epochs=2.0,
        reward=RewardKindConfig(kind="scalar"),
        model=ModelSource(path="runs/sft_tiny"),
        data=DataConfig(path="runs/pairs_tiny/pairs.jsonl", max_length=256, batch_size=16, eval_share=0.2),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=50),
        evaluation=RankingEvaluationConfig(every=50),
    )
