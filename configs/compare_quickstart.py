"""The quickstart's policies compared on its held-out prompts, judged by the task's exact judge and both reward models.

    python -m jaxrm.train --config=configs/compare_quickstart.py

Needs: a finished quickstart in runs/quickstart, two CPU cores, about three minutes. Add a judge and start it again:
only what is new is asked, e.g. --config.judges.lm.language_model=HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from jaxrm.comparison_config import (
    CompareConfig,
    ComparedPolicyConfig,
    ComparisonJudgeConfig,
    PromptSetConfig,
)
from jaxrm.models.sampling import SamplingConfig
from jaxrm.stage_config import Compare

RUNS = "runs/quickstart"


def get_config() -> Compare:
    return Compare(
        run_dir=f"{RUNS}/compare",
        policies={name: ComparedPolicyConfig(path=f"{RUNS}/{name}") for name in ("sft", "ppo_scalar", "ppo_seq2seq")},
        prompts={
            name: PromptSetConfig(path="task:safety", split=name, max_prompts=128) for name in ("heldout", "test_ood")
        },
        judges={
            "exact": ComparisonJudgeConfig(function="task:safety"),
            "rm_seq2seq": ComparisonJudgeConfig(reward_model=f"{RUNS}/rm_seq2seq"),
            "rm_scalar": ComparisonJudgeConfig(reward_model=f"{RUNS}/rm_scalar"),
        },
        compare=CompareConfig(
            against="all", sampling=SamplingConfig(max_new_tokens=40), batch_size=64, reference=f"{RUNS}/sft"
        ),
    )
