"""The command: figures as a table, JSON and a page."""

import json
import re

import numpy as np
from support.planning import EIGHT

from jaxrm import plan
from jaxrm.config import command_line
from jaxrm.config.files import load_config_file
from jaxrm.planning.stages import planned_stages


def run_plan(*arguments):
    argv = ["plan", "--config=configs/sft_tiny.py", "--config.model.preset=lab-tiny", "--config.data.batch_size=8"]
    argv += [f"--topology={EIGHT}", "--config.logging.progress=False", *arguments]
    return command_line.run(plan.main, plan.CONFIG_CLASSES, define_flags=plan.define_flags, argv=argv)


def test_the_command_writes_the_figures(tmp_path, capsys):
    assert run_plan(f"--json={tmp_path / 'plan.json'}") == 0
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["topology"] == EIGHT and np.isfinite(figures["programs"][0]["cost"]["flops"])
    assert "train step" in capsys.readouterr().out


def test_a_mesh_that_does_not_divide_is_named_with_one_that_does(here, capsys):
    assert run_plan("--config.mesh.data=1", "--config.mesh.tensor=8", "--tries=1") == 1
    output = capsys.readouterr().out
    assert "The config does not fit cpu:8 as written: config.mesh.tensor is 8" in output
    assert "Use --config.mesh.data=" in output


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
    pipeline, _ = load_config_file("configs/quickstart.py", plan.CONFIG_CLASSES)
    stages = planned_stages(pipeline, None)
    assert list(stages) == ["sft", "rm_scalar", "rm_seq2seq", "ppo_scalar", "ppo_seq2seq"]
    assert {stage.model.preset for stage in stages.values()} == {pipeline.sft.model.preset}
    assert all(stage.model.path is None for stage in stages.values())
    shaped = planned_stages(pipeline, "gemma-2b")
    assert {stage.model.preset for stage in shaped.values()} == {"gemma-2b"}
