"""Seq2seq reward model of the size of Llama 2 7B: rewrites rejected responses into chosen ones and copies chosen ones.

    python -m jaxrm.train --config=configs/rm_seq2seq_llama_2_7b.py --config.mesh.fsdp=32

Needs: an account that may download meta-llama/Llama-2-7b-hf (or --config.model.path=FOLDER, or the folder of an SFT
run, which is what the paper starts from); 16 bytes a parameter for parameters, gradients and moments, 108 GB spread
over the fsdp axis, and activations. Learning rate, schedule, epochs and weight decay are those of the published
recipe; batch and length are jaxrm's choice.
"""

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import CorrectionEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.sharding.mesh import MeshConfig
from jaxrm.stage_config import Seq2SeqRM


def get_config() -> Seq2SeqRM:
    return Seq2SeqRM(
        run_dir="runs/rm_seq2seq_llama_2_7b",
        num_epochs=2.0,
        model=ModelSource(path="meta-llama/Llama-2-7b-hf", dtype="bfloat16"),
        data=DataConfig(path="PKU-Alignment/PKU-SafeRLHF", template="llama2", max_length=2048, batch_size=64),
        optimizer=OptimizerConfig(
            lr=2e-5, schedule="cosine", warmup=0.03, weight_decay=0.1, b1=0.9, b2=0.95, clip_norm=1.0
        ),
        evaluation=CorrectionEvaluationConfig(sampling=SamplingConfig(max_new_tokens=512, temperature=0.0)),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
