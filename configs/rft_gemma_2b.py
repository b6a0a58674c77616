"""Rejection sampling fine-tuning of Gemma 2B: best of 16 by its seq2seq reward model, then SFT on the winners.

    python -m jaxrm.train --config=configs/rft_gemma_2b.py --config.winners.mesh.fsdp=8

Needs: the runs of `configs/sft_gemma_2b.py` and `configs/rm_seq2seq_gemma_2b.py` (or other folders, as
--config.winners.model.path, --config.sft.model.path and --config.winners.reward.model); to draw, policy and reward
model, 20 GB while they are read and half of that later, and the cache; for SFT 16 bytes a parameter, 40 GB spread
over the fsdp axis, and activations. For the baseline add --config.winners.reward.kind=scalar
--config.winners.reward.model=runs/rm_scalar_gemma_2b --config.run_dir=runs/rft_scalar_gemma_2b. n, batch and length
are jaxrm's choice.
"""

from jaxrm.algorithms.best_of_n import BestOfNConfig
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import EvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.pipeline.config import Pipeline, pipeline
from jaxrm.sharding.mesh import MeshConfig
from jaxrm.stage_config import SFT, BestOfN

POLICY = ModelSource(path="runs/sft_gemma_2b", dtype="bfloat16")


def get_config() -> Pipeline:
    winners = BestOfN(
        reward=RewardConfig(kind="literal", model="runs/rm_seq2seq_gemma_2b"),
        model=POLICY,
        data=DataConfig(path="PKU-Alignment/PKU-SafeRLHF", template="gemma", max_length=1024, batch_size=128),
        best_of_n=BestOfNConfig(n=16),
        rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=512)),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
    sft = SFT(
        num_epochs=2.0,
        model=POLICY,
        # Winners answer the prompts of the training side, so that a larger share has to be held out of them.
        data=DataConfig(
            path="stage:winners/winners.jsonl", template="gemma", max_length=1024, batch_size=32, eval_share=0.1
        ),
        optimizer=OptimizerConfig(lr=1e-5),
        mesh=winners.mesh,
        evaluation=EvaluationConfig(every=100),
    )
    return pipeline(run_dir="runs/rft_gemma_2b", winners=winners, sft=sft)
