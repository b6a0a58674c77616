"""What ``model.remat=auto`` comes to: by the room on a device, alike when a run goes on, and shown before it starts."""

import dataclasses
import json
from pathlib import Path

import pytest

import jaxrm
from jaxrm.algorithms.ppo_config import PPOConfig
from jaxrm.algorithms.reward_config import RewardConfig
from jaxrm.config import dicts
from jaxrm.data.config import DataConfig
from jaxrm.models.build import ModelSource
from jaxrm.models.lora import LoRAConfig
from jaxrm.runtime.metrics import LoggingConfig
from jaxrm.runtime.run_folder import check_run
from jaxrm.sharding.mesh import MeshConfig, build_mesh
from jaxrm.stages import remat

GIB = 2**30
AUTO = ModelSource(preset="smollm2-135m", remat="auto")
DATA = DataConfig(path="task:safety", batch_size=8, max_length=512)
SFT = jaxrm.SFT(run_dir="run", model=AUTO, data=DATA)
PPO = jaxrm.PPO(run_dir="run", model=AUTO, data=DATA, reward=RewardConfig(kind="scalar", function="a:b"))


@pytest.mark.parametrize("config", [SFT, PPO, dataclasses.replace(SFT, lora=LoRAConfig(rank=4))])
def test_more_is_kept_where_there_is_more_memory(config):
    mesh = build_mesh(MeshConfig())
    needs = remat._bytes_needed(config, mesh)
    assert needs["dots"] > needs["attention"] > needs["full"]
    for level, need in needs.items():
        decision = remat.decide_for(config, mesh, need)
        assert decision.config == dataclasses.replace(config, model=dataclasses.replace(AUTO, remat=level))
    for memory in (None, 1.0):
        assert remat.decide_for(config, mesh, memory).config.model.remat == "full"
    explicit = dataclasses.replace(config, model=dataclasses.replace(AUTO, remat="none"))
    assert remat.decide_for(explicit, mesh, 1.0) == (explicit, "")


def test_a_critic_leaves_less_room():
    mesh = build_mesh(MeshConfig())
    alone = dataclasses.replace(PPO, ppo=PPOConfig(advantage="rloo"))
    with_critic, without = (remat._bytes_needed(config, mesh) for config in (PPO, alone))
    assert with_critic["full"] > 1.5 * without["full"]
    saved, saved_without = (needs["dots"] - needs["full"] for needs in (with_critic, without))
    assert saved == pytest.approx(2 * saved_without)  # one backward pass of two models


def test_a_run_goes_on_as_it_was_decided(tmp_path, monkeypatch):
    """Whatever the devices have by then; a config that names what was recorded is that of the run too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remat, "device_limit", lambda: 64 * GIB)
    assert remat.decide(SFT).config.model.remat == "dots"
    recorded = dataclasses.replace(SFT, model=dataclasses.replace(AUTO, remat="attention"))
    Path("run").mkdir()
    Path("run/run.json").write_text(json.dumps({"config": dicts.to_dict(recorded), "launches": []}))
    decision = remat.decide(SFT)
    assert decision.config == recorded and decision.line == "--config.model.remat=auto is attention: as in run"
    for config in (SFT, recorded):  # what a pipeline compares, and what a stage does
        check_run("run", dicts.to_dict(config))
    assert remat.decide(dataclasses.replace(SFT, on_existing="restart")).config.model.remat == "dots"


def test_what_was_decided_is_recorded_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remat, "device_limit", lambda: GIB)
    config = jaxrm.SFT(
        run_dir="run",
        model=ModelSource(preset="lab-tiny", remat="auto"),
        data=DataConfig(path="task:safety", batch_size=8, max_length=128, max_records=64, max_eval_records=16),
        logging=LoggingConfig(tensorboard=False, progress=False),
        num_steps=1,
    )
    line = "--config.model.remat=auto is dots: about "
    assert line in str(jaxrm.check(config))
    assert jaxrm.run(config) == jaxrm.run(config) == 0
    output = capsys.readouterr().out
    assert line in output and "--config.model.remat=auto is dots: as in run" in output
    assert json.loads(Path("run/run.json").read_text())["config"]["model"]["remat"] == "dots"
