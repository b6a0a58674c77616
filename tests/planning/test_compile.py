"""Plans of stages: the programs that run are compiled, and the figures agree with hand counts."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
from support.planning import config, tpu

from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.config.dicts import with_changes
from jaxrm.errors import UserError
from jaxrm.models.config import preset
from jaxrm.models.flops import training_flops_per_token
from jaxrm.planning.compile import plan_stage
from jaxrm.planning.programs import stage_programs
from jaxrm.planning.report import critic_note, print_plan
from jaxrm.planning.topology import CHIPS, open_topology
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.sharding.partition import device_bytes


@pytest.mark.parametrize("algorithm", ["sft", "seq2seq_rm", "scalar_rm"])
def test_flops_agree_with_the_hand_count(here, algorithm):
    one = config(algorithm)
    (program,) = plan_stage(one, here).programs
    whole = stage_programs(one, build_mesh(one.mesh, here.devices))
    # The hand count takes the causal half of attention, where all of it is computed, as if rows were twice as long. Two
    # things are computed again rather than kept: the scores of attention, and the logits of a loss over words.
    shape, is_scalar = preset("lab-tiny"), algorithm == "scalar_rm"
    by_hand = training_flops_per_token(shape, 2 * 64, scalar_head=is_scalar)
    by_hand += 2 * 64 * shape.num_heads * shape.head_dim * shape.num_layers
    by_hand += 0 if is_scalar else 2 * shape.hidden_size * shape.vocab_size
    assert program.cost.flops == pytest.approx(by_hand * 16 * 64, rel=0.005)
    assert whole.parameters > 300_000 and program.tokens == 16 * 64


PPO = config("ppo", reward=RewardConfig(kind="soft", model="runs/none"))


@pytest.fixture(scope="module")
def ppo_plan(here):
    return plan_stage(PPO, here)


@pytest.mark.slow
def test_a_plan_of_ppo_has_all_programs_and_residents(ppo_plan, capsys):
    """Residents stay on a device through the whole run."""
    names = [program.name for program in ppo_plan.programs]
    assert names == ["rollout", "log_probs", "scoring", "update"]
    assert ppo_plan.residents.keys() == {"policy", "critic", "reference", "reward model"}
    resident_bytes = sum(ppo_plan.residents.values())
    assert all(program.peak >= resident_bytes > 0 for program in ppo_plan.programs)
    assert ppo_plan.fits and all(program.fits is None for program in ppo_plan.programs)
    print_plan(ppo_plan)
    assert re.search(r"^\W*update\b", capsys.readouterr().out, re.MULTILINE)
    json.dumps(ppo_plan.as_json(), allow_nan=False)


def test_a_sum_of_sources_holds_each_model_once(here):
    """Two of one run share its weights and its pass; a function needs none."""
    rewards = {
        "words": RewardConfig(kind="literal", model="runs/a"),
        "doubts": RewardConfig(kind="soft", model="runs/a"),
        "score": RewardConfig(kind="scalar", model="runs/b"),
        "rule": RewardConfig(kind="scalar", function="my:rule"),
    }
    planned = stage_programs(config("ppo", rewards=rewards), build_mesh(PPO.mesh, here.devices))
    names = [program.name for program in planned.programs]
    assert names == ["rollout", "log_probs", "scoring words", "scoring score", "update"]
    assert planned.residents.keys() == {"policy", "critic", "reference", "reward model words", "reward model score"}


@pytest.mark.slow
def test_a_plan_without_a_critic_has_none(here, ppo_plan):
    """In groups of two: the policy is updated alone, and the rollout has one set of keys for both of a group."""
    groups = {"ppo.advantage": "rloo", "rollout.responses_per_prompt": 2}
    plan = plan_stage(with_changes(PPO, groups), here)
    assert [program.name for program in plan.programs] == ["rollout", "log_probs", "scoring", "update"]
    assert plan.residents.keys() == {"policy", "reference", "reward model"}
    assert sum(plan.residents.values()) < 0.7 * sum(ppo_plan.residents.values())
    assert all(one.peak < other.peak for one, other in zip(plan.programs, ppo_plan.programs, strict=True))


def test_what_a_critic_takes_is_said_where_ppo_does_not_fit():
    plan = SimpleNamespace(fits=False, residents={"policy": 2**31, "critic": 2**31})
    assert "the critic has 2 GiB. --config.ppo.advantage=rloo and grpo have none" in critic_note(plan)
    assert critic_note(SimpleNamespace(fits=True, residents=plan.residents)) == ""
    assert critic_note(SimpleNamespace(fits=False, residents={"policy": 2**31})) == ""


@pytest.mark.slow
def test_the_samplers_copy_is_resident_during_sampling_alone(here, ppo_plan):
    """The reshard is a program of its own; it gathers over fsdp and over tensor, in either order."""
    plan = plan_stage(with_changes(PPO, {"rollout.mesh": MeshConfig()}), here)
    assert [program.name for program in plan.programs][:3] == ["reshard", "rollout", "log_probs"]
    assert plan.residents == ppo_plan.residents
    reshard, rollout, log_probs = plan.programs[:3]
    gathered_bytes = reshard.cost.collectives["all-gather"]
    assert 0.7 * 4 * plan.parameters < gathered_bytes < 1.6 * 4 * plan.parameters and reshard.cost.flops == 0
    fsdp_rollout, fsdp_log_probs = ppo_plan.programs[:2]
    assert rollout.cost.collectives.get("all-gather", 0) < 0.05 * fsdp_rollout.cost.collectives["all-gather"]
    resident = fsdp_rollout.parts["parameters"]
    assert rollout.parts["parameters"] == pytest.approx(resident + 4 * plan.parameters, rel=0.01)
    assert log_probs.parts["parameters"] == resident
    assert log_probs.peak == fsdp_log_probs.peak


@pytest.mark.slow
def test_arguments_of_a_program_take_the_planned_memory(here):
    one = config()
    stage = stage_programs(one, build_mesh(one.mesh, here.devices))
    (program,) = stage.programs
    compiled = program.jitted.trace(*program.arguments).lower().compile()
    (counted,) = plan_stage(one, here).programs
    argument_bytes = device_bytes(program.arguments)
    assert (
        counted.parts["parameters"] + counted.parts["optimizer"]
        == device_bytes(stage.residents["state"])
        < argument_bytes
    )
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(argument_bytes, rel=0.01)


@pytest.mark.slow
def test_sharded_parameters_are_gathered(here):
    replicated = plan_stage(dataclasses.replace(config(), mesh=MeshConfig(data=8)), here).programs[0].cost.collectives
    sharded = (
        plan_stage(dataclasses.replace(config(), mesh=MeshConfig(data=1, fsdp=8)), here).programs[0].cost.collectives
    )
    assert replicated.keys() == {"all-reduce"} and sharded["all-gather"] > 0.5 * 360_000 * 4


def test_what_has_no_plan_is_refused(here):
    with pytest.raises(UserError, match="what can be planned is sft"):
        plan_stage(config("evaluate"), here)
    with pytest.raises(UserError, match="does not fit 8 devices"):
        plan_stage(dataclasses.replace(config(), mesh=MeshConfig(data=3)), here)


def test_a_program_that_does_not_fit_says_so(here):
    small = dataclasses.replace(here, chip=dataclasses.replace(CHIPS["v5e"], memory=1e-6))
    plan = plan_stage(config(), small)
    assert not plan.fits and plan.programs[0].fits is False


@tpu
@pytest.mark.slow
def test_a_tpu_that_is_not_there_is_compiled_for():
    topology = open_topology("v5e:2x2")
    plan = plan_stage(dataclasses.replace(config(), mesh=MeshConfig(data=1, fsdp=4)), topology)
    (program,) = plan.programs
    assert plan.fits and 0 < program.peak < 2**30 and plan.memory == 15.75 * 2**30
    low, high = plan.seconds
    assert 0 < low <= high and 0 < plan.mfu[1] <= plan.mfu[0] < 1
    assert program.cost.dcn_bytes == 0
    assert sum(program.cost.collectives.values()) > 360_000 * 4  # parameters are gathered, gradients scattered


@tpu
@pytest.mark.slow
def test_between_slices_only_the_gradients_go():
    topology = open_topology("v5e:2x2:2")
    one = dataclasses.replace(config(), mesh=MeshConfig(data=2, fsdp=4))
    mesh = build_mesh(one.mesh, topology.devices)
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
    (program,) = plan_stage(one, topology).programs
    gradients = 360_000 * 4 / 4  # a quarter of them on each device
    assert 0.8 * gradients < program.cost.dcn_bytes < 3 * gradients
    with pytest.raises(UserError, match="there are 2 slices"):
        build_mesh(MeshConfig(data=1, fsdp=8), topology.devices)


@tpu
def test_an_axis_may_be_a_part_of_a_row_of_chips():
    for name, slices in (("v5e:16x16", 1), ("v5e:16x16:2", 2)):
        mesh = build_mesh(MeshConfig(data=-1, fsdp=8), open_topology(name).devices)
        assert mesh.shape["data"] == 32 * slices and len({device.id for device in mesh.devices.flat}) == 256 * slices
        # The eight of a row of the mesh are near each other.
        for row in mesh.devices[:, :, 0, 0]:
            spans = [max(c) - min(c) for c in zip(*(device.coords for device in row), strict=True)]
            assert sum(spans) <= 8
