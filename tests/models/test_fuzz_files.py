"""Model files of any content: a model that can be used, or one line that says what is wrong."""

import copy
import json
import resource

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.adapters import LLAMA, adapter_folder, change_config
from support.fuzz import damaged, damages, fuzz
from support.gguf_files import hub_tensors, write_gguf

from jaxrm.errors import UserError
from jaxrm.models.config import PRESETS, ModelConfig
from jaxrm.models.hub import check_weights, load_params, parse_hf_config, read_model_config, to_hf_config
from jaxrm.models.hub.hf_fields import ARCHITECTURES
from jaxrm.models.hub.peft import read_adapter
from jaxrm.models.hub.peft_config import _NEUTRAL, _READ, _REFUSED
from jaxrm.models.hub.safetensors_file import open_tensors

SMALL = ModelConfig("llama", 24, 32, 64, 2, 4, 2, 8, max_position=128, norm_eps=1e-5, rope_theta=500.0)
PUBLISHED = {name: to_hf_config(config) for name, config in PRESETS.items() if name[:3] not in ("tin", "lab")}
NUMBERS = [0, 1, -1, 2, 3, 7, 64, 10**9, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-6, 1e300, float("inf"), float("nan")]
VALUES = [*NUMBERS, None, True, False, "", "silu", "64", "gelu", [], {}, [1], ["full_attention"] * 2, [None], {"a": 1}]
ROPE = {
    "rope_type": ["llama3", "linear", "default", "yarn", None, 3, []],
    "factor": VALUES,
    "rope_theta": VALUES,
    "low_freq_factor": VALUES,
    "high_freq_factor": VALUES,
    "original_max_position_embeddings": VALUES,
    "partial_rotary_factor": VALUES,
}
FIELDS = {name for config in PUBLISHED.values() for name in config} | {
    "attention_bias",
    "mlp_bias",
    "use_sliding_window",
    "max_window_layers",
    "sliding_window_pattern",
    "layer_types",
    "head_dim",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "rope_local_base_freq",
    "hidden_activation",
    "use_bidirectional_attention",
    "quantization_config",
    "text_config",
    "eos_token_id",
}


def one_line(error):
    assert "\n" not in str(error) and len(str(error)) < 1500, error


@st.composite
def configs(draw):
    values = copy.deepcopy(draw(st.sampled_from(list(PUBLISHED.values()))))
    values["model_type"] = draw(st.sampled_from([values["model_type"], *ARCHITECTURES, "gemma3"]))
    for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4)):
        values[name] = draw(st.sampled_from(VALUES))
    for name in draw(st.lists(st.sampled_from(sorted(values)), max_size=1)):
        del values[name]
    if draw(st.booleans()):
        part = {name: draw(st.sampled_from(ROPE[name])) for name in draw(st.sets(st.sampled_from(sorted(ROPE))))}
        form = draw(st.sampled_from(["rope_scaling", "rope_parameters", "nested"]))
        values["rope_parameters" if form == "nested" else form] = {"full_attention": part} if form == "nested" else part
    return values


@fuzz
@given(configs())
def test_fuzz_a_config_is_read_or_refused(values):
    """What is read has sizes of a model, and can be written again where its family can express it."""
    try:
        config = parse_hf_config(values)
    except UserError as error:
        one_line(error)
        return
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "head_dim", "max_position"):
        size = getattr(config, name)
        assert type(size) is int and 1 <= size < 2**31
    assert 0 < config.norm_eps <= 1e30 and 0 < config.rope_theta <= 1e30
    assert config.num_layers <= 10_000
    try:
        assert parse_hf_config(to_hf_config(config)) == config or config.query_scale is not None
    except UserError as error:
        one_line(error)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = hub_tensors(SMALL)
    (folder / "config.json").write_text(json.dumps(to_hf_config(SMALL)))
    save_file(tensors, folder / "whole")
    return folder


@fuzz
@given(damage=damages)
def test_fuzz_a_safetensors_file_is_read_or_refused(checkpoint, damage):
    """What is read is what the library of the format reads."""
    from safetensors import SafetensorError, safe_open

    file, content = checkpoint / "model.safetensors", (checkpoint / "whole").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.unlink(missing_ok=True)  # an earlier reader may still map it
    file.write_bytes(damaged(content, damage, header))
    try:
        stored = open_tensors(file)
    except UserError as error:
        one_line(error)
        return
    try:
        theirs = safe_open(file, "np")
        names = set(theirs.keys())
    except SafetensorError:
        assert any(tensor.unreadable for tensor in stored.values())  # of a type that neither knows
        return
    assert set(stored) == names
    for name, tensor in stored.items():
        if not tensor.unreadable:
            assert np.array_equal(tensor.read(), theirs.get_tensor(name), equal_nan=True)
    try:
        check_weights(str(checkpoint), SMALL)
    except UserError as error:
        one_line(error)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return adapter_folder(tmp_path_factory.mktemp("adapters") / "adapter")


@fuzz
@given(
    st.dictionaries(st.sampled_from(sorted(_READ | _NEUTRAL | _REFUSED.keys())), st.sampled_from(VALUES), max_size=3)
)
def test_fuzz_an_adapter_config_is_read_or_refused(adapters, fields):
    """What is read has the rank of the tensors, and a scale that is a number."""
    whole = (adapters / "adapter_config.json").read_text()
    change_config(adapters, **fields)
    try:
        adapter, _ = read_adapter(str(adapters), LLAMA)
        assert adapter.lora.rank == 4 and 0 < adapter.lora.scale < 1e31
    except UserError as error:
        one_line(error)
    finally:
        (adapters / "adapter_config.json").write_text(whole)


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "whole", SMALL, hub_tensors(SMALL))
    return folder


@fuzz
@given(damage=damages)
def test_fuzz_a_gguf_file_is_read_or_refused(gguf_folder, damage):
    file, content = gguf_folder / "model.gguf", (gguf_folder / "whole").read_bytes()
    file.unlink(missing_ok=True)  # an earlier reader may still map it
    file.write_bytes(damaged(content, damage, 2200))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        config = read_model_config(str(file))
        assert isinstance(config, ModelConfig)
        check_weights(str(file), config)
        if config == SMALL:
            load_params(str(file), config)
    except UserError as error:
        one_line(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
