"""Adapters in PEFT on torch and here: the same logits and scores, whoever wrote the folder."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest
from support.adapters import LLAMA, our_logits, random_adapters, random_params

from jaxrm.models import lora as low_rank
from jaxrm.models.hub import export_model
from jaxrm.models.hub.peft import read_adapter, write_adapter
from jaxrm.models.hub.peft_config import _NEUTRAL, _READ, _REFUSED
from jaxrm.models.lora import LoRAConfig

pytestmark = [
    pytest.mark.slow,  # for the import of peft
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's use of it
    pytest.mark.skipif(
        importlib.util.find_spec("peft") is None, reason="peft is not installed (tests/requirements-torch.txt)"
    ),
]
GEMMA = dataclasses.replace(
    LLAMA, family="gemma", activation="gelu_tanh", unit_offset_norm=True, scale_embedding=True, tie_embeddings=True
)
CONFIGS = [LLAMA, dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, head_dim=4), GEMMA]
every_family = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.family)
LORAS = {
    "all": LoRAConfig(4),
    "query and value": LoRAConfig(2, 3.0, targets=("q_proj", "v_proj")),
    "rank stabilized": LoRAConfig(8, rank_stabilized=True),
}
every_lora = pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
TOKENS = np.random.default_rng(5).integers(3, LLAMA.vocab_size, (2, 12))
TOLERANCE = 1e-5


class Padding:
    """As much of a tokenizer as an export needs."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def save_pretrained(self, folder):
        pass


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Parameters of a base, and the folder that transformers opens."""

    def make(config, scalar_head=False):
        params = jax.tree.map(lambda x: 0.5 * x, random_params(config, scalar_head=scalar_head))
        return params, export_model(tmp_path_factory.mktemp("base") / "base", params, config, tokenizer=Padding())

    return make


def opened(base, scalar_head=False):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if scalar_head else AutoModelForCausalLM
    return auto.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


def torch_logits(model) -> np.ndarray:
    """Logits ``[B, T, V]``, of a classifier ``[B]``."""
    import torch

    with torch.no_grad():
        return model(
            torch.from_numpy(TOKENS), attention_mask=torch.ones(TOKENS.shape, dtype=torch.int64)
        ).logits.numpy()


def adapted_logits(base, adapters, config, lora) -> np.ndarray:
    logits = our_logits(low_rank.join(base, adapters), config, TOKENS, lora)
    return logits[:, -1:] if "scalar_head" in adapters else logits


def random_peft_model(base, lora, scalar_head=False):
    """A model with adapters that PEFT made, of which B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    peft = LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        use_rslora=lora.rank_stabilized,
        target_modules=list(lora.targets),
        lora_dropout=0.1,
        task_type="SEQ_CLS" if scalar_head else "CAUSAL_LM",
    )
    model = get_peft_model(opened(base, scalar_head), peft).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "score.modules_to_save" in name:
                parameter.normal_(std=0.1)
    return model


def test_every_field_of_peft_is_read_refused_or_neutral():
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == _READ | _NEUTRAL | _REFUSED.keys()
    assert len(fields) == len(_READ) + len(_NEUTRAL) + len(_REFUSED)


@every_family
@every_lora
def test_peft_reads_a_folder_written_here_alike(exported, tmp_path, config, lora):
    from peft import PeftModel

    params, base = exported(config)
    adapters = random_adapters(config, lora)
    folder = write_adapter(tmp_path / "out", adapters, config, lora, base=str(base))
    model = PeftModel.from_pretrained(opened(base), folder).eval()
    theirs = torch_logits(model)
    assert np.abs(theirs - adapted_logits(params, adapters, config, lora)).max() < TOLERANCE
    assert np.abs(theirs - our_logits(params, config, TOKENS)).max() > 100 * TOLERANCE


@every_family
@every_lora
def test_a_folder_that_peft_wrote_is_read_alike(exported, tmp_path, config, lora):
    params, base = exported(config)
    model = random_peft_model(base, lora)
    model.save_pretrained(tmp_path)
    adapter, adapters = read_adapter(str(tmp_path), config)
    assert (adapter.lora, adapter.scalar_head, adapter.base) == (lora, False, str(base))
    assert np.abs(torch_logits(model) - adapted_logits(params, adapters, config, lora)).max() < TOLERANCE


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=lambda config: config.family)
def test_classifiers_of_peft_score_alike_both_ways(exported, tmp_path, config):
    from peft import PeftModel

    lora = LORAS["all"]
    params, base = exported(config, scalar_head=True)
    adapters = random_adapters(config, lora, scalar_head=True)
    folder = write_adapter(tmp_path / "ours", adapters, config, lora, base=str(base))
    frozen = {"decoder": params["decoder"]}
    theirs = torch_logits(PeftModel.from_pretrained(opened(base, True), folder).eval())
    assert np.abs(theirs - adapted_logits(frozen, adapters, config, lora)).max() < TOLERANCE

    model = random_peft_model(base, lora, scalar_head=True)
    model.save_pretrained(tmp_path / "theirs")
    adapter, adapters = read_adapter(str(tmp_path / "theirs"), config)
    assert adapter.scalar_head
    assert np.abs(torch_logits(model) - adapted_logits(frozen, adapters, config, lora)).max() < TOLERANCE


@every_family
def test_a_merged_export_is_base_and_adapter_in_transformers(exported, tmp_path, config):
    from peft import PeftModel

    lora = LORAS["rank stabilized"]
    params, base = exported(config)
    adapters = random_adapters(config, lora)
    folder = write_adapter(tmp_path / "adapter", adapters, config, lora, base=str(base))
    export_model(tmp_path / "merged", low_rank.merge(low_rank.join(params, adapters), lora), config)
    apart = torch_logits(PeftModel.from_pretrained(opened(base), folder).eval())
    assert np.abs(apart - torch_logits(opened(tmp_path / "merged"))).max() < TOLERANCE
