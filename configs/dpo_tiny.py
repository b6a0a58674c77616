"""Direct preference optimization on the embedded task: the policy learns from pairs without a reward model.

    python -m jaxrm.train --config=configs/dpo_tiny.py

Needs: the policy that it starts from and pairs of that policy's responses, `configs/sft_tiny.py` and then
`configs/pairs_tiny.py`; two CPU cores, 2 GB of memory, about a minute. With the loss of IPO instead:
--config.dpo.kind=ipo --config.run_dir=runs/ipo_tiny
"""

from jaxrm.algorithms.dpo import DPOConfig
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.stage_config import DPO


def get_config() -> DPO:
    return DPO(
        run_dir="runs/dpo_tiny",
        num_epochs=2.0,
        model=ModelSource(path="runs/sft_tiny"),
        data=DataConfig(path="runs/pairs_tiny/pairs.jsonl", max_length=256, batch_size=16, eval_share=0.2),
        dpo=DPOConfig(beta=0.1),
        optimizer=OptimizerConfig(lr=1e-4),
        checkpoint=CheckpointConfig(every=50),
        evaluation=JudgedEvaluationConfig(every=10, judge="task:safety"),
    )
