"""Plans with adapters: the base counts once, and only the adapters have moments and gradients."""

import dataclasses
from typing import NamedTuple

import jax
import pytest
from support.planning import MESH, config, with_memory

from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.config.dicts import with_changes
from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.flops import forward_flops
from jaxrm.models.lora import LoRAConfig
from jaxrm.models.quantized_params import count_parameters
from jaxrm.models.sampling import SamplingConfig
from jaxrm.planning import search
from jaxrm.planning.compile import plan_stage
from jaxrm.planning.programs import stage_programs
from jaxrm.planning.report import print_plan
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.sharding.partition import device_bytes

RANK = 4


class Plan(NamedTuple):
    """What a search reads of a plan."""

    fits: bool


LORA = LoRAConfig(rank=RANK)


def adapted(algorithm="sft", **sections):
    return config(algorithm, lora=LORA, **sections)


def ppo(kind="soft", **sections):
    return adapted("ppo", reward=RewardConfig(kind=kind, model="runs/none"), **sections)


def stage_of(one, here):
    return stage_programs(one, build_mesh(one.mesh, here.devices))


def bytes_of(tree):
    """Bytes of a tree without its shardings, on all devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", ["soft", "scalar"])
def test_four_roles_stand_on_one_base_that_counts_once(here, kind):
    """What is beside a program and what it takes are together the residents, for every program."""
    stage = stage_of(ppo(kind), here)
    assert list(stage.residents) == ["policy", "reference", "base", "critic", "reward model"]
    base, resident = device_bytes(stage.residents["base"]), device_bytes(dict(stage.residents))
    assert bytes_of(stage.residents["base"]) == 4 * (stage.parameters - stage.trained_parameters)
    assert resident - base < base, "the adapters of four roles and two optimizers are less than the base"
    for program in stage.programs:
        assert device_bytes(program.resident_arguments) + stage.bytes_beside(program) == resident
        assert base / 2 < device_bytes(program.resident_arguments) < resident


def test_moments_and_gradients_are_those_of_the_adapters_alone(here):
    stage = stage_of(adapted(), here)
    state, base = stage.residents["state"], stage.residents["base"]
    paths = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    assert set(paths) == {"lora_a", "lora_b"}
    assert stage.trained_parameters == count_parameters(state.params) == stage.parameters - count_parameters(base)
    assert bytes_of(state.opt_state) == pytest.approx(2 * bytes_of(state.params), rel=0.01)


def test_a_scalar_head_is_trained_beside_the_adapters(here):
    sft, scalar = (stage_of(adapted(name), here) for name in ("sft", "scalar_rm"))
    assert scalar.trained_parameters - sft.trained_parameters == scalar.shape.hidden_size


@pytest.mark.parametrize(("quantize", "bits"), [("int8", 8), ("nf4", 4)])
def test_a_quantized_base_has_the_bytes_of_codes_and_scales(here, quantize, bits):
    """The projections alone are quantized; scales are less than an eighth of the codes."""
    plain, quantized = (stage_of(with_changes(adapted(), {"model.quantize": kind}), here) for kind in (None, quantize))
    shape = plain.shape
    projections = (
        shape.num_layers
        * shape.hidden_size
        * (2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim + 3 * shape.intermediate_size)
    )
    before, after = (bytes_of(stage.residents["base"]) for stage in (plain, quantized))
    codes = projections * bits / 8
    assert codes < after - (before - 4 * projections) < 1.25 * codes
    assert quantized.parameters == plain.parameters and quantized.trained_parameters == plain.trained_parameters
    assert bytes_of(quantized.residents["state"].opt_state) == bytes_of(plain.residents["state"].opt_state)


@pytest.mark.slow
def test_the_parts_of_a_peak_are_base_and_adapters(here, capsys):
    plan, stage = plan_stage(adapted(), here), stage_of(adapted(), here)
    (program,) = plan.programs
    assert list(program.parts) == ["base", "adapters", "optimizer", "cache", "activations"]
    assert program.parts["base"] == device_bytes(stage.residents["base"])
    assert sum(program.parts.values()) == pytest.approx(program.peak)
    print_plan(plan)
    printed = capsys.readouterr().out
    assert f"{plan.trained_parameters / 1e6:.3g} million of them trained" in printed
    assert "base" in printed and "adapters" in printed


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "seq2seq_rm", "scalar_rm"])
def test_products_are_those_of_the_hand_count(here, algorithm):
    """The traced step has no gradient of a frozen kernel: 4 FLOPs a weight in place of 6.

    In float32 it may multiply with merged kernels, which is another count.
    """
    one = adapted(algorithm)
    one = dataclasses.replace(one, model=dataclasses.replace(one.model, dtype="bfloat16"))
    (program,) = plan_stage(one, here).programs
    shape, is_scalar = stage_of(one, here).shape, algorithm == "scalar_rm"
    D, F, N, K, H = (
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
    )
    weights = shape.num_layers * (2 * D * (N + K) * H + 3 * D * F)
    adapters = shape.num_layers * RANK * (2 * (D + N * H) + 2 * (D + K * H) + 3 * (D + F))
    head = D * (1 if is_scalar else shape.vocab_size)
    tokens, T = 16 * 64, 64
    attention = shape.num_layers * 4 * T * N * H  # all of the scores are computed, not their causal half
    by_hand = 4 * weights + 6 * adapters + 3 * attention + (6 if is_scalar else 4) * head
    # Computed again rather than kept: the scores of attention, and the logits of a loss over words.
    by_hand += attention / 2 + (0 if is_scalar else 2 * head)
    assert program.cost.flops == pytest.approx(by_hand * tokens, rel=0.01)
    by_model = by_hand - 2 * attention - (0 if is_scalar else 2 * head)
    assert program.model_flops == pytest.approx(by_model * tokens, rel=1e-9)


def rollout_of(here, **options):
    rollout = RolloutConfig(sampling=SamplingConfig(max_new_tokens=16), mesh=MESH, **options)
    one = dataclasses.replace(ppo(), rollout=rollout)
    return next(program for program in stage_of(one, here).programs if program.name == "rollout")


def test_prompts_answered_in_parts_have_a_part_of_the_cache(here):
    whole, parts = (rollout_of(here, num_microbatches=count) for count in (1, 4))
    assert whole.cache_bytes == 4 * parts.cache_bytes == 2 * rollout_of(here, slots=8).cache_bytes > 0
    assert whole.model_flops == parts.model_flops


def test_responses_to_one_prompt_share_its_cache_and_its_pass(here):
    """Rows of 48 + 16 tokens: 16 of them, or 16 responses of 16 to 4 prompts of 48."""
    alone, shared = (rollout_of(here, responses_per_prompt=n) for n in (1, 4))
    assert shared.cache_bytes / alone.cache_bytes == (4 * 48 + 16 * 16) / (16 * 64)
    assert [x.shape for x in shared.arguments[1:3]] == [(4, 48)] * 2 and shared.tokens == alone.tokens
    decoder = stage_of(ppo(), here).shape
    prompt = forward_flops(decoder, 48, predicted=0, lora=LORA)
    assert alone.model_flops - shared.model_flops == pytest.approx(12 * prompt)


@pytest.mark.slow
def test_where_weights_do_not_fit_adapters_are_suggested(here):
    """Nothing milder is compiled, since not even the weights and their moments fit."""
    one = dataclasses.replace(
        config(),
        model=ModelSource(preset="smollm2-135m"),
        data=DataConfig(path="task:safety", max_length=32, batch_size=8),
        mesh=MeshConfig(),
    )
    alone = dataclasses.replace(here, devices=here.devices[:1])
    state = device_bytes(dict(stage_of(one, alone).residents))
    trials = search.nearest_fit(one, with_memory(alone, 0.8 * state / 2**30), most=8)
    assert [each.as_flags() for each in trials] == ["--config.lora.rank=16"] and trials[0].plan.fits


def test_half_of_the_trials_are_for_adapters(here, monkeypatch):
    """Where residents fit and nothing else does, milder changes do not use up all of the trials."""
    plan = Plan(fits=False)
    monkeypatch.setattr(search, "plan_stage", lambda *_, **__: plan)
    trials = search.nearest_fit(config(), with_memory(here, 1.0), most=6)
    assert [("lora.rank" in each.changes) for each in trials] == [False] * 3 + [True] * 3
    assert trials[3].changes == {"lora.rank": 16}


def test_prompts_are_answered_in_parts_where_the_cache_is_large(here, monkeypatch):
    """Before anything is compiled: half of the cache fits beside residents and the weights of the loop over tokens."""
    one = ppo()
    stage = stage_of(one, here)
    rollout = next(program for program in stage.programs if program.name == "rollout")
    weights = device_bytes(rollout.arguments[0])
    memory = device_bytes(dict(stage.residents)) + weights + 1.5 * 0.6 * rollout.cache_bytes
    monkeypatch.setattr(search, "plan_stage", lambda *_, **__: Plan(fits=True))
    (trial,) = search.nearest_fit(one, with_memory(here, memory / 2**30), most=4)
    assert trial.changes == {"num_microbatches": 2, "rollout.num_microbatches": 2}
    slots = dataclasses.replace(one, rollout=dataclasses.replace(one.rollout, slots=16))
    (trial,) = search.nearest_fit(slots, with_memory(here, memory / 2**30), most=4)
    assert trial.changes == {"num_microbatches": 2, "rollout.slots": 8}
