"""A model is not used with another template than it was trained with, unless SFT teaches it."""

import dataclasses

import pytest
from support.stage_configs import stage_config

from jaxrm.data.config import DataConfig
from jaxrm.data.template_comparison import write_alike
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError
from jaxrm.inference.reference import check_reference_template
from jaxrm.models.build import ModelSource
from jaxrm.stages.trained_template import check_trained_template


@pytest.fixture
def tokenizer(task_folder):
    return load_tokenizer(str(task_folder / "tokenizer"))


def config_of(algorithm, run, template):
    config = stage_config(algorithm, model=ModelSource(path=str(run)), data=DataConfig(path="task:safety"))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, template=template))


@pytest.mark.parametrize("algorithm", ["dpo", "ppo", "seq2seq_rm", "scalar_rm", "best_of_n", "evaluate"])
def test_another_template_than_that_of_the_run_is_refused(make_run, tokenizer, tmp_path, algorithm):
    make_run(tmp_path / "run")
    check_trained_template(config_of(algorithm, tmp_path / "run", "auto"), tokenizer)
    with pytest.raises(
        UserError,
        match=r"^config.data.template is 'hh', but .*/run was trained with 'auto', which writes a dialogue "
        r"differently; use that, --config.data.template=auto, or teach the new one by SFT first$",
    ):
        check_trained_template(config_of(algorithm, tmp_path / "run", "hh"), tokenizer)


def test_sft_may_teach_another_template_and_says_so(make_run, tokenizer, tmp_path, capsys):
    make_run(tmp_path / "run")
    check_trained_template(config_of("sft", tmp_path / "run", "auto"), tokenizer)
    assert capsys.readouterr().out == ""
    check_trained_template(config_of("sft", tmp_path / "run", "hh"), tokenizer)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("config.data.template is 'hh', but") and line.endswith("; this run teaches the new one")


def test_a_template_of_another_name_that_writes_alike_is_fine(tokenizer):
    renamed = load_tokenizer(tokenizer.name_or_path)
    renamed.chat_template = {"default": tokenizer.chat_template, "other": "{{ messages }}"}
    assert write_alike((tokenizer, "auto"), (renamed, "auto"))
    assert write_alike((tokenizer, "auto"), (renamed, "tokenizer:default"))
    assert not write_alike((tokenizer, "auto"), (tokenizer, "hh"))


def test_a_reference_of_another_template_is_refused(tokenizer):
    check_reference_template((tokenizer, "auto"), "rm", (tokenizer, "auto"), "runs/sft")
    with pytest.raises(UserError, match=r"^config.reference is 'runs/sft', trained with .*'hh', but rm with 'auto'"):
        check_reference_template((tokenizer, "auto"), "rm", (tokenizer, "hh"), "runs/sft")
