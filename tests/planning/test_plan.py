"""Plans: what is compiled is what runs, and the figures agree with hand counts."""

import dataclasses
import importlib.util
import json
import re

import numpy as np
import pytest

from jaxrm import plan
from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.config import command_line
from jaxrm.config.files import load_config_file
from jaxrm.data.config import DataConfig
from jaxrm.errors import UserError
from jaxrm.experiment import Experiment
from jaxrm.models.build import ModelSource
from jaxrm.models.config import preset
from jaxrm.models.flops import training_flops_per_token
from jaxrm.models.generate import SamplingConfig
from jaxrm.planning import scaling as plan_scaling
from jaxrm.planning import search as plan_search
from jaxrm.planning.cost import plan_stage
from jaxrm.planning.programs import device_bytes, stage_programs
from jaxrm.planning.report import print_plan
from jaxrm.planning.topology import CHIPS, open_topology
from jaxrm.sharding.mesh import MeshConfig, build_mesh

EIGHT = "cpu:8"
tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs (libtpu) is not here"
)


@pytest.fixture(scope="module")
def here():
    return open_topology(EIGHT)


def config(algorithm="sft", **more):
    return Experiment(
        algorithm=algorithm,
        model=ModelSource(preset="lab-tiny", remat="none"),
        data=DataConfig(path="task:safety", max_length=64, batch_size=16),
        rollout=RolloutConfig(sampling=SamplingConfig(max_new_tokens=16)),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        **more,
    )


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


def test_a_plan_of_ppo_has_all_programs_and_residents(here, capsys):
    """Residents stay on a device through the whole run."""
    found = plan_stage(config("ppo", reward=RewardConfig(kind="soft", model="runs/none")), here)
    assert [program.name for program in found.programs] == [
        "respond",
        "read",
        "score",
        "update policy",
        "update critic",
    ]
    assert found.residents.keys() == {"policy", "critic", "reference", "reward model"}
    beside = sum(found.residents.values())
    assert all(program.peak >= beside > 0 for program in found.programs)
    assert found.fits and all(program.fits is None for program in found.programs)
    print_plan(found)
    assert "update critic" in capsys.readouterr().out
    json.dumps(found.as_json(), allow_nan=False)


def test_the_samplers_copy_is_resident_during_sampling_alone(here):
    """The reshard is a program of its own; it gathers over fsdp and over tensor, in either order."""
    one = config("ppo", reward=RewardConfig(kind="scalar", function="task:safety"))
    rollout = dataclasses.replace(one.rollout, mesh=MeshConfig())
    other = dataclasses.replace(one, rollout=rollout)
    plain, whole = plan_stage(one, here), plan_stage(other, here)
    assert [program.name for program in whole.programs][:3] == ["reshard", "respond", "read"]
    assert whole.residents == plain.residents
    reshard, respond, read = whole.programs[:3]
    gathered = reshard.cost.collectives["all-gather"]
    assert 0.7 * 4 * whole.parameters < gathered < 1.6 * 4 * whole.parameters and reshard.cost.flops == 0
    assert respond.cost.collectives.get("all-gather", 0) < 0.05 * plain.programs[0].cost.collectives["all-gather"]
    held = plain.programs[0].parts["parameters"]
    assert respond.parts["parameters"] == pytest.approx(held + 4 * whole.parameters, rel=0.01)
    assert read.parts["parameters"] == held
    assert read.peak == plain.programs[1].peak


def test_arguments_of_a_program_take_the_planned_memory(here):
    one = config()
    found = stage_programs(one, build_mesh(one.mesh, here.devices))
    (program,) = found.programs
    compiled = program.jitted.trace(*program.arguments).lower().compile()
    (counted,) = plan_stage(one, here).programs
    given = device_bytes(program.arguments)
    assert counted.parts["parameters"] + counted.parts["optimizer"] == device_bytes(found.residents["state"]) < given
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(given, rel=0.01)


def test_sharded_parameters_are_gathered(here):
    copied = plan_stage(dataclasses.replace(config(), mesh=MeshConfig(data=8)), here).programs[0].cost.collectives
    sharded = (
        plan_stage(dataclasses.replace(config(), mesh=MeshConfig(data=1, fsdp=8)), here).programs[0].cost.collectives
    )
    assert copied.keys() == {"all-reduce"} and sharded["all-gather"] > 0.5 * 360_000 * 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e", "v5e:4x4"),
        ("v99:2x2", "v5p:4x4x4"),
        ("cpu:3", "devices are open already"),
        ("cpu:0", "use one of"),
        ("cpu:8:2", "only TPUs have slices; e.g. --topology=cpu:8"),
        ("v5e:16x16:0", "use one of"),
        ("moon:2x2", "use one of"),
        ("h100:1x2x8", "h100:2x8"),
    ],
)
def test_an_unknown_topology_is_answered_with_what_there_is(name, words):
    with pytest.raises(UserError, match=words):
        open_topology(name)


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="a compiler for GPUs is here")
def test_a_missing_compiler_is_answered_with_what_to_install():
    with pytest.raises(UserError, match=r"pip install 'jax\[cuda13\]'"):
        open_topology("h100:8")


def test_what_has_no_plan_is_refused(here):
    with pytest.raises(UserError, match="what can be planned is sft"):
        plan_stage(config("evaluate"), here)
    with pytest.raises(UserError, match="does not fit 8 devices"):
        plan_stage(dataclasses.replace(config(), mesh=MeshConfig(data=3)), here)


def test_the_command_writes_the_figures(tmp_path, capsys):
    assert run_plan(f"--json={tmp_path / 'plan.json'}") == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["topology"] == EIGHT and np.isfinite(found["programs"][0]["cost"]["flops"])
    assert "train step" in capsys.readouterr().out


def test_a_program_that_does_not_fit_says_so(here):
    small = dataclasses.replace(here, chip=dataclasses.replace(CHIPS["v5e"], memory=1e-6))
    found = plan_stage(config(), small)
    assert not found.fits and found.programs[0].fits is False


def with_memory(topology, gib):
    return dataclasses.replace(topology, chip=dataclasses.replace(CHIPS["v5e"], memory=gib))


def test_the_nearest_change_that_fits_is_more_microbatches(here):
    one = config()
    whole, halves = (
        plan_stage(dataclasses.replace(one, num_microbatches=parts), here).programs[0].peak / 2**30 for parts in (1, 2)
    )
    assert halves < whole
    tries = plan_search.nearest_fit(one, with_memory(here, (whole + halves) / 2), most=4)
    assert [each.change for each in tries] == [{"num_microbatches": 2}] and tries[0].plan.fits
    assert tries[0].typed("config.sft.") == "--config.sft.num_microbatches=2"


def test_where_even_the_state_is_too_large_nothing_is_compiled(here):
    assert plan_search.nearest_fit(config(), with_memory(here, 1e-6), most=4) == []


@tpu
def test_a_search_ranks_the_fastest_that_fits_first():
    """What does not fit comes last."""
    topology = open_topology("v5e:2x2")
    tries = plan_search.best_fits(config(), topology, most=3)
    assert len(tries) == 3 and all(each.plan.fits for each in tries)
    assert [each.plan.seconds[1] for each in tries] == sorted(each.plan.seconds[1] for each in tries)
    meshes = [tuple(each.plan.mesh.values()) for each in tries]
    assert len(set(meshes)) == 3 and all(np.prod(mesh) == 4 for mesh in meshes)
    tight = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=tries[0].plan.fullest / 2**30))
    again = plan_search.best_fits(config(), tight, most=3)
    fits = [each.plan.fits for each in again]
    assert True in fits and False in fits and fits == sorted(fits, reverse=True)


def run_plan(*arguments):
    argv = ["plan", "--config=configs/sft_tiny.py", "--config.model.preset=lab-tiny", "--config.data.batch_size=8"]
    argv += [f"--topology={EIGHT}", "--config.logging.progress=False", *arguments]
    return command_line.run(plan.main, plan.CONFIG_CLASSES, define_flags=plan.define_flags, argv=argv)


def test_a_mesh_that_does_not_divide_is_named_with_one_that_does(here, capsys):
    assert run_plan("--config.mesh.data=1", "--config.mesh.tensor=8", "--tries=1") == 1
    said = capsys.readouterr().out
    assert "As it is it cannot be laid over cpu:8: config.mesh.tensor is 8" in said
    assert "Use --config.mesh.data=" in said


def test_the_page_has_bars_and_tables_and_loads_nothing(tmp_path, here):
    assert run_plan(f"--html={tmp_path / 'plan.html'}") == 0
    page = (tmp_path / "plan.html").read_text()
    assert 'class="bars card"' in page and "optimizer" in page and "train step" in page
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)=["']?http""", page)


def test_an_unwritable_file_is_refused_before_compilation(capsys):
    assert run_plan("--json=/nowhere/plan.json") == 2
    assert "--json is '/nowhere/plan.json'" in capsys.readouterr().err


def test_pipeline_stages_are_planned_with_their_first_model():
    """The first model is the one that a stage begins with."""
    several, _ = load_config_file("configs/quickstart.py", plan.CONFIG_CLASSES)
    stages = plan.stages_of(several, None)
    assert list(stages) == ["sft", "rm_scalar", "rm_seq2seq", "ppo_scalar", "ppo_seq2seq"]
    assert {stage.model.preset for stage in stages.values()} == {several.sft.model.preset}
    assert all(stage.model.path is None for stage in stages.values())
    shaped = plan.stages_of(several, "gemma-2b")
    assert {stage.model.preset for stage in shaped.values()} == {"gemma-2b"}


def test_weak_scaling_gives_every_device_as_many_rows(here, capsys):
    parts = [
        dataclasses.replace(with_memory(here, 16.0), name=f"cpu:{count}", devices=here.devices[:count])
        for count in (2, 4, 8)
    ]
    one = dataclasses.replace(
        config(), mesh=MeshConfig(), data=DataConfig(path="task:safety", max_length=64, batch_size=4)
    )
    plans = plan_scaling.weak_scaling(one, parts)
    assert [found.batch_size for found in plans] == [4, 8, 16]
    seconds = [found.programs[0].cost.compute_seconds for found in plans]
    sent = [found.programs[0].cost.collectives["all-reduce"] for found in plans]
    each = [size / (1 - 1 / count) for size, count in zip(sent, (2, 4, 8), strict=True)]
    assert each == pytest.approx([each[0]] * 3, rel=0.01)  # the gradients, on a ring of so many devices
    assert [found.programs[0].cost.flops for found in plans] == pytest.approx(
        [plans[0].programs[0].cost.flops * times for times in (1, 2, 4)]
    )
    assert seconds[0] is None  # no peak of a CPU is known
    plan_scaling.print_scaling(plans)
    assert "cpu:8" in capsys.readouterr().out
    cost = dataclasses.replace(plans[0].programs[0].cost, compute_seconds=1.0, memory_seconds=0.5, link_seconds=0.1)
    steady = dataclasses.replace(plans[0], programs=(dataclasses.replace(plans[0].programs[0], cost=cost),))
    slower = dataclasses.replace(cost, memory_seconds=2.0, link_seconds=0.2)
    bent = dataclasses.replace(
        steady, programs=(dataclasses.replace(steady.programs[0], cost=slower),), topology="more"
    )
    assert "does not bend" in plan_scaling.bend([steady, steady])
    assert "bends at more: efficiency 50%" in plan_scaling.bend([steady, bent])
    assert "memory takes 2 s there and 0.5 s on" in plan_scaling.bend([steady, bent])
    with pytest.raises(UserError, match="required multiples"):
        plan_scaling.weak_scaling(one, [parts[1], parts[0]])


tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs (libtpu) is not here"
)


@tpu
def test_a_tpu_that_is_not_there_is_compiled_for():
    topology = open_topology("v5e:2x2")
    found = plan_stage(dataclasses.replace(config(), mesh=MeshConfig(data=1, fsdp=4)), topology)
    (program,) = found.programs
    assert found.fits and 0 < program.peak < 2**30 and found.memory == 15.75 * 2**30
    low, high = found.seconds
    assert 0 < low <= high and 0 < found.mfu[1] <= found.mfu[0] < 1
    assert program.cost.far_bytes == 0
    assert sum(program.cost.collectives.values()) > 360_000 * 4  # parameters are gathered, gradients scattered


@tpu
def test_between_slices_only_the_gradients_go():
    topology = open_topology("v5e:2x2:2")
    one = dataclasses.replace(config(), mesh=MeshConfig(data=2, fsdp=4))
    mesh = build_mesh(one.mesh, topology.devices)
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
    (program,) = plan_stage(one, topology).programs
    of_gradients = 360_000 * 4 / 4  # a quarter of them on each device
    assert 0.8 * of_gradients < program.cost.far_bytes < 3 * of_gradients
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
