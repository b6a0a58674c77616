"""A scalar reward model, exported, gives the same scores in transformers."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrm.algorithms.reading import response_scores
from jaxrm.models import build, heads
from jaxrm.models.build import ModelSource
from jaxrm.models.config import ModelConfig
from jaxrm.models.hub import export_model
from jaxrm.types import ResponseBatch

SOURCE = ModelSource(preset="given")
LLAMA = ModelConfig(
    family="llama",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position=64,
)
GEMMA = dataclasses.replace(
    LLAMA, family="gemma", activation="gelu_tanh", unit_offset_norm=True, scale_embedding=True, tie_embeddings=True
)
PAD = 0


class Padding:
    """As much of a tokenizer as an export needs."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, PAD

    def save_pretrained(self, folder):
        pass


def scalar_params(config):
    _, shapes, _ = build.abstract_decoder(config, SOURCE)
    rng = np.random.default_rng(3)
    decoder = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.3), jnp.float32), shapes)
    kernel = jnp.asarray(rng.normal(size=config.hidden_size), jnp.float32)
    return heads.from_decoder_params(decoder, {"kernel": kernel})


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=lambda config: config.family)
def test_an_exported_scalar_model_is_a_classifier_of_one_label(config, tmp_path):
    from safetensors.numpy import load_file

    params = scalar_params(config)
    folder = export_model(tmp_path / "out", params, config, tokenizer=Padding())
    fields = json.loads((folder / "config.json").read_text())
    assert fields["architectures"] == [f"{config.family.capitalize()}ForSequenceClassification"]
    assert fields["id2label"] == {"0": "reward"}
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert np.array_equal(tensors["score.weight"], np.asarray(params["scalar_head"]["kernel"])[None])
    embedding = np.asarray(params["decoder"]["embedder"]["embedding"])
    assert np.array_equal(tensors["model.embed_tokens.weight"], embedding)


@pytest.mark.torch
@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed (tests/requirements-torch.txt)"
)
@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=lambda config: config.family)
def test_transformers_scores_an_exported_scalar_model_alike(config, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification

    params = scalar_params(config)
    folder = export_model(tmp_path / "out", params, config, tokenizer=Padding())
    rng = np.random.default_rng(5)
    prompts, responses = rng.integers(3, 40, (3, 7)), rng.integers(3, 40, (3, 9))
    lengths = np.array([9, 4, 1])
    batch = ResponseBatch(
        jnp.asarray(prompts, jnp.int32),
        jnp.ones((3, 7), bool),
        jnp.asarray(responses, jnp.int32),
        jnp.asarray(np.arange(9)[None] < lengths[:, None]),
    )
    graphdef, _, _ = build.abstract_scalar_model(config, SOURCE)
    ours = jax.jit(functools.partial(response_scores, graphdef))(params, batch)

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    rows = np.full((3, 16), PAD)
    for row, length in enumerate(lengths):
        rows[row, : 7 + length] = [*prompts[row], *responses[row, :length]]
    with torch.no_grad():
        theirs = model(torch.from_numpy(rows), attention_mask=torch.from_numpy((rows != PAD).astype(np.int64))).logits
    assert theirs.shape == (3, 1)
    assert np.abs(np.asarray(ours) - theirs[:, 0].numpy()).max() < 1e-4
    assert np.ptp(np.asarray(ours)) > 0.1
