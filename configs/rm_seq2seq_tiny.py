"""Seq2seq reward model on the embedded task: it learns to rewrite the policy's rejected responses into chosen ones.

    python -m jaxrm.train --config=configs/rm_seq2seq_tiny.py

Needs: the policy that it starts from and pairs of that policy's responses, `configs/sft_tiny.py` and then
`configs/pairs_tiny.py`; two CPU cores, 2 GB of memory, about two minutes.
"""

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.data.config import DataConfig
from jaxrm.data.pairs import MappingConfig
from jaxrm.evaluation.config import CorrectionEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.stage_config import Seq2SeqRM


def get_config() -> Seq2SeqRM:
    return Seq2SeqRM(
        run_dir="runs/rm_seq2seq_tiny",
        num_epochs=2.0,
        # In a world of 198 words the turn alone is instruction enough. The weight has its evidence in jaxrm/study.
        mapping=MappingConfig(instruction="", edit_weight=4.0),
        model=ModelSource(path="runs/sft_tiny"),
        data=DataConfig(path="runs/pairs_tiny/pairs.jsonl", max_length=256, batch_size=16, eval_share=0.2),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=50),
        evaluation=CorrectionEvaluationConfig(every=50, judge="task:safety"),
    )
