"""Responses that a device has no room for are refused in one line, with what fits."""

import dataclasses

import jax
import pytest

from jaxrm.errors import UserError
from jaxrm.inference import decode_memory
from jaxrm.models.config import PRESETS
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stage_config import PPO

SHAPE = dataclasses.replace(PRESETS["tiny"], num_layers=2, num_kv_heads=2, head_dim=8)
A_TOKEN = 2 * 2 * 2 * 8 * 4  # bytes: keys and values, layers, heads, size, float32


def check(monkeypatch, limit, rollout, *, devices=1, batch_size=64):
    """A prompt of 36 tokens and responses of 28; weights take 1,000 bytes."""
    monkeypatch.setattr(decode_memory, "device_limit", lambda: limit)
    config = PPO(run_dir="run")
    sampling = dataclasses.replace(config.rollout.sampling, max_new_tokens=28)
    config = dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, sampling=sampling, **rollout),
        data=dataclasses.replace(config.data, batch_size=batch_size),
    )
    mesh = build_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    decode_memory.check_rollout(config, SHAPE, mesh, 1000.0, 36)


@pytest.mark.parametrize(
    ("rollout", "devices", "words"),
    [
        ({"slots": 16}, 1, r"config.rollout.slots is 16, .* use --config.rollout.slots=6$"),
        ({}, 1, r"config.data.batch_size is 64, .* use --config.rollout.slots=6$"),
        ({}, 2, r"config.data.batch_size is 64, .* use --config.rollout.slots=12$"),
        ({"num_microbatches": 4}, 1, r"use --config.rollout.num_microbatches=1 --config.rollout.slots=6$"),
        ({"responses_per_prompt": 4}, 1, r"use --config.rollout.slots=8$"),  # 36 + 4 x 28 tokens for four
    ],
)
def test_more_slots_than_memory_are_refused_with_what_fits(monkeypatch, rollout, devices, words):
    """Ten responses of 64 tokens fit, and six while they are filled."""
    with pytest.raises(UserError, match=words):
        check(monkeypatch, 1000 + 10 * 64 * A_TOKEN, rollout, devices=devices)


def test_a_prompt_and_its_response_must_fit(monkeypatch):
    words = r"config.rollout.sampling.max_new_tokens is 28, .* one prompt of up to 36 tokens .*max_new_tokens=9$"
    with pytest.raises(UserError, match=words):
        check(monkeypatch, 1000 + 32 * A_TOKEN, {"slots": 1})


def test_what_fits_or_cannot_be_known_is_not_refused(monkeypatch):
    check(monkeypatch, 1000 + 64 * 64 * A_TOKEN, {})
    check(monkeypatch, None, {})
