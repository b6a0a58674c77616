"""Seq2seq reward model with adapters (LoRA) on Gemma 2B: rewrites rejected responses into chosen ones.

    python -m jaxrm.train --config=configs/rm_seq2seq_lora_gemma_2b.py

Needs: an account that may download google/gemma-2b (or --config.model.path=FOLDER, or of the SFT run with adapters,
which is what the paper starts from). `python -m jaxrm.plan --config=configs/rm_seq2seq_lora_gemma_2b.py
--model=gemma-2b --topology=h100:1` says what it takes. The learning rate is ten times that of
`configs/rm_seq2seq_gemma_2b.py`, the factor that LoRA Without Regret (Schulman et al. 2025) found, with its alpha. The
rest is as there.
"""

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import CorrectionEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import LoRAConfig
from jaxrm.models.sampling import SamplingConfig
from jaxrm.sharding.mesh import MeshConfig
from jaxrm.stage_config import Seq2SeqRM


def get_config() -> Seq2SeqRM:
    return Seq2SeqRM(
        run_dir="runs/rm_seq2seq_lora_gemma_2b",
        num_epochs=2.0,
        num_microbatches=4,
        model=ModelSource(path="google/gemma-2b", dtype="bfloat16"),
        lora=LoRAConfig(rank=16, alpha=32.0),
        data=DataConfig(path="PKU-Alignment/PKU-SafeRLHF", template="gemma", max_length=2048, batch_size=32),
        optimizer=OptimizerConfig(
            lr=2e-4, schedule="cosine", warmup=0.03, weight_decay=0.1, b1=0.9, b2=0.95, clip_norm=1.0
        ),
        evaluation=CorrectionEvaluationConfig(sampling=SamplingConfig(max_new_tokens=512, temperature=0.0)),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
