"""A model that is exported from a run carries the chat template of its training."""

import dataclasses

import pytest
from absl import flags

from jaxrm import export
from jaxrm.data.records import Message
from jaxrm.data.templates import encode_prompt
from jaxrm.inference.load import load_policy, load_reward_model

DIALOGUE = [Message("user", "hello"), Message("assistant", "good"), Message("user", "why 12?")]


def export_run(run, output):
    values = flags.FlagValues()
    export.define_flags(values)
    values(["export", f"--checkpoint={run}", f"--output={output}"])
    assert export.main(None, values) == 0


@pytest.mark.parametrize("algorithm", ["sft", "scalar_rm"])
def test_an_export_renders_prompts_as_the_run_did(make_run, tmp_path, algorithm):
    from transformers import AutoTokenizer

    make_run(tmp_path / "run", algorithm, template="hh")
    trained = (load_reward_model if algorithm == "scalar_rm" else load_policy)(str(tmp_path / "run"))
    expected = encode_prompt(trained.tokenizer, DIALOGUE, "hh")
    assert expected != encode_prompt(trained.tokenizer, DIALOGUE, "auto")
    export_run(tmp_path / "run", tmp_path / "exported")
    opened = AutoTokenizer.from_pretrained(tmp_path / "exported")
    dicts = [dataclasses.asdict(message) for message in DIALOGUE]
    assert opened.apply_chat_template(dicts, add_generation_prompt=True, return_dict=False) == expected
    if algorithm == "sft":
        again = load_policy(str(tmp_path / "exported"))
        assert encode_prompt(again.tokenizer, DIALOGUE, again.template) == expected
