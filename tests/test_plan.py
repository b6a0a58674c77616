"""Plans: what is compiled is what runs, and the figures agree with hand counts."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from jaxrm import command_line, plan
from jaxrm.algorithms.ppo_config import RolloutConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.data.config import DataConfig
from jaxrm.errors import UserError
from jaxrm.experiment import Experiment
from jaxrm.models.build import ModelSource
from jaxrm.models.config import preset
from jaxrm.models.flops import training_flops_per_token
from jaxrm.models.generate import SamplingConfig
from jaxrm.runtime.mesh import MeshConfig, build_mesh
from jaxrm.runtime.topology import CHIPS, open_topology
from jaxrm.stages.plan_report import print_plan
from jaxrm.stages.planning import planned
from jaxrm.stages.programs import device_bytes, programs_of

EIGHT = "cpu:8"


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
    (program,) = planned(one, here).programs
    whole = programs_of(one, build_mesh(one.mesh, here.devices))
    # The hand count takes the causal half of attention, where all of it is computed, as if rows were twice as long. Two
    # things are computed again rather than kept: the scores of attention, and the logits of a loss over words.
    shape, is_scalar = preset("lab-tiny"), algorithm == "scalar_rm"
    by_hand = training_flops_per_token(shape, 2 * 64, scalar_head=is_scalar)
    by_hand += 2 * 64 * shape.num_heads * shape.head_dim * shape.num_layers
    by_hand += 0 if is_scalar else 2 * shape.hidden_size * shape.vocab_size
    assert program.cost.flops == pytest.approx(by_hand * 16 * 64, rel=0.005)
    assert whole.parameters > 300_000 and program.tokens == 16 * 64


def test_a_plan_of_ppo_has_every_program_and_all_that_stays_on_a_device(here, capsys):
    found = planned(config("ppo", reward=RewardConfig(kind="soft", model="runs/none")), here)
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


def test_what_is_given_to_a_program_takes_the_room_that_was_counted(here):
    one = config()
    found = programs_of(one, build_mesh(one.mesh, here.devices))
    (program,) = found.programs
    compiled = program.jitted.trace(*program.arguments).lower().compile()
    (counted,) = planned(one, here).programs
    given = device_bytes(program.arguments)
    assert counted.parts["parameters"] + counted.parts["optimizer"] == device_bytes(found.residents["state"]) < given
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(given, rel=0.01)


def test_sharded_parameters_are_gathered(here):
    copied = planned(dataclasses.replace(config(), mesh=MeshConfig(data=8)), here).programs[0].cost.collectives
    sharded = planned(dataclasses.replace(config(), mesh=MeshConfig(data=1, fsdp=8)), here).programs[0].cost.collectives
    assert copied.keys() == {"all-reduce"} and sharded["all-gather"] > 0.5 * 360_000 * 4


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e", "v5e:4x4"),
        ("v99:2x2", "v5p:4x4x4"),
        ("cpu:3", "devices are open already"),
        ("cpu:0", "use one of"),
        ("moon:2x2", "use one of"),
        ("h100:1x2x8", "h100:2x8"),
    ],
)
def test_an_unknown_topology_is_answered_with_what_there_is(name, words):
    with pytest.raises(UserError, match=words):
        open_topology(name)


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="a compiler for accelerators is here")
def test_a_missing_compiler_is_answered_with_what_to_install():
    with pytest.raises(UserError, match=r"pip install 'jax\[cuda13\]'"):
        open_topology("h100:8")


def test_what_has_no_plan_is_refused(here):
    with pytest.raises(UserError, match="what can be planned is sft"):
        planned(config("evaluate"), here)
    with pytest.raises(UserError, match="does not fit 8 devices"):
        planned(dataclasses.replace(config(), mesh=MeshConfig(data=3)), here)


def test_the_command_writes_the_figures(tmp_path, capsys):
    argv = ["plan", "--config=configs/sft_tiny.py", "--config.model.preset=lab-tiny", "--config.data.batch_size=8"]
    argv += [f"--topology={EIGHT}", f"--json={tmp_path / 'plan.json'}"]
    assert command_line.run(plan.main, Experiment, define_flags=plan.define_flags, argv=argv) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["topology"] == EIGHT and np.isfinite(found["programs"][0]["cost"]["flops"])
    assert "train step" in capsys.readouterr().out


def test_a_program_that_does_not_fit_says_so(here):
    small = dataclasses.replace(here, chip=dataclasses.replace(CHIPS["v5e"], memory=1e-6))
    found = planned(config(), small)
    assert not found.fits and found.programs[0].fits is False
