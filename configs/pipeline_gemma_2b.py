"""The whole recipe at the size of Gemma 2B: SFT, both reward models, PPO with each, compared on one page.

    python -m jaxrm.train --config=configs/pipeline_gemma_2b.py

Needs: an account that may download the model (or --config.sft.model.path=FOLDER) and accelerators with room for PPO
(see `configs/ppo_gemma_2b.py`): policy, critic, reference and reward model at once. Run a stage alone with
--config.stages=sft, and override any field of it: --config.ppo_seq2seq.ppo.kl_coef=0.05. Published defaults.
Prompts out of distribution are added with --config.compare.prompts.ood.path=FILE, a judge
with --config.compare.judges.lm.language_model=MODEL.
"""

from dataclasses import replace

from jaxrm.algorithms.optimizer import OptimizerConfig
from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.comparison_config import CompareConfig, ComparedPolicyConfig, ComparisonJudgeConfig, PromptSetConfig
from jaxrm.data.config import DataConfig
from jaxrm.evaluation.config import JudgedEvaluationConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.sampling import SamplingConfig
from jaxrm.pipeline.config import Pipeline, pipeline
from jaxrm.sharding.mesh import MeshConfig
from jaxrm.stage_config import PPO, SFT, Compare, ScalarRM, Seq2SeqRM

POLICY = ModelSource(path="stage:sft", dtype="bfloat16")
SAMPLING = SamplingConfig(max_new_tokens=512)


def get_config(data: str = "PKU-Alignment/PKU-SafeRLHF") -> Pipeline:
    """Config of all stages on ``data``, which --config=configs/pipeline_gemma_2b.py:DATA gives."""
    pairs = DataConfig(path=data, template="gemma", max_length=2048, batch_size=64)
    mesh = MeshConfig(data=1, fsdp=-1)
    sft = SFT(
        num_epochs=3.0,
        model=ModelSource(path="google/gemma-2b", dtype="bfloat16"),
        data=pairs,
        optimizer=OptimizerConfig(lr=2e-5),
        mesh=mesh,
    )
    decayed = OptimizerConfig(lr=2e-5, weight_decay=0.1)
    rm_scalar = ScalarRM(num_epochs=2.0, model=POLICY, data=pairs, optimizer=decayed, mesh=mesh)
    rm_seq2seq = Seq2SeqRM(num_epochs=2.0, model=POLICY, data=pairs, optimizer=decayed, mesh=mesh)
    ppo_scalar = PPO(
        num_epochs=1.0,
        reward=RewardConfig(kind="scalar", model="stage:rm_scalar"),
        model=POLICY,
        data=replace(pairs, max_length=1024, max_eval_records=256),
        ptx=replace(pairs, max_length=1024),
        rollout=RolloutConfig(sampling=SAMPLING),
        optimizer=OptimizerConfig(lr=1e-5),
        mesh=mesh,
        evaluation=JudgedEvaluationConfig(every=50, samples=8, sampling=SAMPLING),
    )
    ppo_seq2seq = replace(ppo_scalar, reward=RewardConfig(kind="literal", model="stage:rm_seq2seq"))
    compare = Compare(
        policies={name: ComparedPolicyConfig(path=f"stage:{name}") for name in ("sft", "ppo_scalar", "ppo_seq2seq")},
        prompts={"in_distribution": PromptSetConfig(path=data, held_out_share=pairs.eval_share, max_prompts=256)}
        | {name: PromptSetConfig(path=f"set:{name}") for name in ("plain", "harmless", "harmful")},
        judges={
            "rm_scalar": ComparisonJudgeConfig(reward_model="stage:rm_scalar"),
            "rm_seq2seq": ComparisonJudgeConfig(reward_model="stage:rm_seq2seq"),
        },
        compare=CompareConfig(sampling=SAMPLING, reference="stage:sft"),
        mesh=mesh,
    )
    return pipeline(
        run_dir="runs/pipeline_gemma_2b",
        sft=sft,
        rm_scalar=rm_scalar,
        rm_seq2seq=rm_seq2seq,
        ppo_scalar=ppo_scalar,
        ppo_seq2seq=ppo_seq2seq,
        compare=compare,
    )
