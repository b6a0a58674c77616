"""Model configs: their checks, and the presets against the published parameter counts."""

import math
import operator

import jax
import pytest
from flax import nnx

from jaxrm.errors import UserError
from jaxrm.models.config import PRESETS, ModelConfig, RopeScaling, alternating, preset
from jaxrm.models.transformer import Decoder

# Parameter counts as the models' hub pages give them; embeddings that the head shares count once. The 4B of
# Gemma 3 is without its vision encoder (417 million) and projector.
PUBLISHED = {
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}

SMALL = {
    "family": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 4,
}


def parameter_count(config: ModelConfig) -> int:
    state = nnx.eval_shape(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0))))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name):
    assert parameter_count(preset(name)) == PUBLISHED[name]


def test_every_preset_has_a_published_count_but_our_own():
    own = {"tiny": 1.05e6, "lab-tiny": 0.36e6, "lab-small": 5e6, "lab-base": 30e6}
    assert set(PRESETS) == set(PUBLISHED) | set(own)
    for name, about in own.items():
        assert 0.85 * about < parameter_count(preset(name)) < 1.15 * about, name


def test_preset_names_ignore_case_and_a_typo_gets_the_nearest():
    assert preset("Gemma-2B") is PRESETS["gemma-2b"]
    with pytest.raises(UserError, match="did you mean gemma-2b"):
        preset("gema-2b")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"family": "gpt2"}, "ModelConfig.family is 'gpt2'"),
        ({"activation": "relu"}, "ModelConfig.activation is 'relu'"),
        ({"num_heads": 3, "num_kv_heads": 2}, "multiple of num_kv_heads, 2"),
        ({"head_dim": 5}, "ModelConfig.head_dim is 5"),
        ({"num_layers": 0}, "ModelConfig.num_layers is 0"),
        ({"layer_is_sliding": (True,), "sliding_window": 4}, "has 1 entries"),
        ({"layer_is_sliding": (True, False)}, "ModelConfig.sliding_window is None"),
    ],
)
def test_values_that_do_not_fit_are_named(change, named):
    with pytest.raises(UserError, match=named):
        ModelConfig(**SMALL | change)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "yarn", "factor": 2.0}, "kind is 'yarn'"),
        ({"kind": "linear", "factor": 0.0}, "factor is 0.0"),
        ({"kind": "llama3", "factor": 2.0, "high_freq_factor": 1.0}, "high_freq_factor is 1.0"),
    ],
)
def test_rope_scaling_that_makes_no_sense_is_named(fields, named):
    with pytest.raises(UserError, match=named):
        RopeScaling(**fields)


def test_equal_configs_hash_alike():
    """So they may be static arguments under ``jit``."""
    assert len({ModelConfig(**SMALL), ModelConfig(**SMALL), preset("tiny"), preset("TINY")}) == 2


def test_every_sixth_layer_of_gemma_3_sees_the_whole_context():
    whole = [layer for layer, sliding in enumerate(alternating(13, 6)) if not sliding]
    assert whole == [5, 11]
    assert list(map(operator.not_, preset("gemma-2-2b").layer_is_sliding[:4])) == [False, True, False, True]
