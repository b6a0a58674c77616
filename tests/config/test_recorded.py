"""Runs that were made before each stage had a config class of its own."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxrm import train
from jaxrm.config import command_line, dicts
from jaxrm.config.files import load_config_file
from jaxrm.config.recorded import upgraded
from jaxrm.errors import UserError
from jaxrm.evaluation.config import EvaluateConfig
from jaxrm.runtime.run_folder import check_run, open_run
from jaxrm.stage_config import DPO, PLANNED, POLICIES, PPO, RESUMABLE_FIELDS, SFT, STAGES, Evaluate, read_stage

OLD = json.loads((Path(__file__).parent / "old_run.json").read_text())["config"]


def test_the_config_of_an_old_run_is_read():
    """``old_run.json`` is of ``configs/sft_tiny.py`` with two steps, when one class had the fields of all stages."""
    config = read_stage(OLD)
    assert isinstance(config, SFT)
    assert (config.num_steps, config.optimizer.lr, config.data.path) == (2, 2e-3, "task:safety")
    assert "dpo" in OLD and not hasattr(config, "dpo")


def test_an_old_run_is_continued(tmp_path):
    open_run(str(tmp_path / "run"), OLD)
    today = dataclasses.replace(read_stage(OLD), run_dir=str(tmp_path / "run"))
    check_run(today.run_dir, dicts.to_dict(today), on_existing="resume", may_differ=RESUMABLE_FIELDS)
    other = dicts.to_dict(dataclasses.replace(today, seed=7))
    with pytest.raises(UserError, match=r"which holds a run of another config: config\.seed was 0 and is 7"):
        check_run(today.run_dir, other, on_existing="resume", may_differ=RESUMABLE_FIELDS)


def test_renamed_fields_of_an_old_run_are_found():
    old = {**OLD, "algorithm": "evaluate", "answers": {**OLD["answers"], "along": True, "draw": 5}}
    config = read_stage(old)
    assert isinstance(config, Evaluate)
    assert config.evaluate == EvaluateConfig(evaluate_checkpoints=True, sampling_seed=5)


def test_old_stages_of_a_pipeline_or_study_are_read():
    today = {"sft": dicts.to_dict(SFT()), "seed": 1}
    assert set(upgraded({"sft": OLD, "seed": 1}, today)["sft"]) == set(today["sft"])


@pytest.mark.parametrize("row", STAGES.values(), ids=lambda row: row.name)
def test_the_config_of_every_stage_survives_json(row):
    config = row.config_class(run_dir="x")
    recorded = json.loads(json.dumps(dicts.to_dict(config)))
    assert next(iter(recorded)) == "algorithm" and recorded["algorithm"] == row.name
    assert read_stage(recorded) == config
    assert upgraded(recorded, recorded) == recorded


def test_infinite_bounds_can_be_opened_again():
    config = dicts.with_changes(PPO(), {"ppo.value_clip": float("inf"), "optimizer.clip_norm": float("inf")})
    assert read_stage(json.loads(json.dumps(dicts.to_dict(config), allow_nan=False))) == config


def test_a_field_of_another_stage_names_it():
    with pytest.raises(UserError, match=r"^config\.dpo is a field of dpo; this is a run of sft$"):
        dicts.with_changes(SFT(), {"dpo.beta": 3.0})
    with pytest.raises(UserError, match=r"^config\.ppo is a field of ppo; this is a run of dpo$"):
        dicts.from_dict(DPO, {"ppo": {}})
    with pytest.raises(UserError, match=r"^config\.optimizer is a field of sft, .*; this is a run of evaluate$"):
        dicts.with_changes(Evaluate(), {"optimizer": None})


def test_a_field_of_another_stage_in_a_file_names_it(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from jaxrm.stage_config import SFT\ndef get_config():\n    return SFT(ppo=3)\n")
    with pytest.raises(UserError, match=r"x\.py:3: SFT\.ppo is a field of ppo; this is a run of sft$"):
        load_config_file(str(file))


@pytest.mark.parametrize(
    ("stem", "own", "other"), [("sft_tiny", "optimizer.lr", "reward"), ("pairs_tiny", "pairs.count", "optimizer")]
)
def test_help_lists_the_fields_of_the_stage_only(stem, own, other, capsys):
    argv = ["train", f"--config=configs/{stem}.py", "--help"]
    assert command_line.run(train.main, train.CONFIG_CLASSES, argv=argv) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    names = [line.removeprefix("--config.").split("=")[0] for line in lines if line.startswith("--config.")]
    assert own in names and len(names) < 70
    assert not [name for name in names if name.startswith(f"{other}.")]


def test_what_runs_hold_comes_from_the_table():
    assert POLICIES == ("sft", "ppo", "dpo") and PLANNED == ("sft", "seq2seq_rm", "scalar_rm", "ppo", "dpo")


def test_no_stage_is_refused():
    with pytest.raises(UserError, match=r"config\.algorithm is 'pro', which is no stage; the stages are sft, "):
        read_stage({"algorithm": "pro"})


def test_none_of_a_field_that_has_a_number_today_is_read():
    """Runs of PPO recorded ``num_microbatches: null`` for one microbatch, and old ones had it for every stage."""
    before = json.loads(json.dumps(dicts.to_dict(PPO())))
    before["rollout"]["num_microbatches"] = None
    assert read_stage(before) == PPO()
    assert dicts.differences(upgraded(before, dicts.to_dict(PPO())), dicts.to_dict(PPO())) == []
    oldest = {**OLD, "algorithm": "ppo", "rollout": {**OLD["rollout"], "num_microbatches": None}}
    assert read_stage(oldest).rollout.num_microbatches == 1


@pytest.mark.parametrize("stage", ["ppo", "best_of_n", "evaluate"])
def test_a_run_from_before_several_sources_goes_on(stage):
    """Nothing that was added to rewards since changes what such a run computes."""
    today = json.loads(json.dumps(dicts.to_dict(STAGES[stage].config_class())))
    before = {name: value for name, value in today.items() if name != "rewards"}
    old = ("kind", "model", "function", "scale", "center", "center_momentum", "calibration_responses")
    before["reward"] = {name: today["reward"][name] for name in old}
    assert dicts.differences(upgraded(before, today), today) == []
