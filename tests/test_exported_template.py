"""A model that is exported from a run carries the chat template of its training."""

import dataclasses

import pytest
from absl import flags

from jaxrm import export
from jaxrm.data.records import Message
from jaxrm.data.templates import encode_prompt
from jaxrm.errors import UserError, naming
from jaxrm.inference.load import load_policy, load_reward_model

DIALOGUE = [Message("user", "hello"), Message("assistant", "good"), Message("user", "why 12?")]


def export_to(output, *arguments):
    values = flags.FlagValues()
    export.define_flags(values)
    values(["export", f"--output={output}", *arguments])
    assert export.main(None, values) == 0


@pytest.mark.parametrize("algorithm", ["sft", "scalar_rm"])
def test_an_export_renders_prompts_as_the_run_did(make_run, tmp_path, algorithm):
    from transformers import AutoTokenizer

    make_run(tmp_path / "run", algorithm, template="hh")
    trained = (load_reward_model if algorithm == "scalar_rm" else load_policy)(str(tmp_path / "run"))
    expected = encode_prompt(trained.tokenizer, DIALOGUE, "hh")
    assert expected != encode_prompt(trained.tokenizer, DIALOGUE, "auto")
    export_to(tmp_path / "exported", f"--checkpoint={tmp_path / 'run'}")
    opened = AutoTokenizer.from_pretrained(tmp_path / "exported")
    dicts = [dataclasses.asdict(message) for message in DIALOGUE]
    assert opened.apply_chat_template(dicts, add_generation_prompt=True, return_dict=False) == expected
    if algorithm == "sft":
        again = load_policy(str(tmp_path / "exported"))
        assert encode_prompt(again.tokenizer, DIALOGUE, again.template) == expected


def test_published_weights_carry_the_template_that_is_named(make_run, tmp_path):
    """Their own, unless another is named; without one there is nothing that ends a response."""
    from transformers import AutoTokenizer

    make_run(tmp_path / "run")
    export_to(tmp_path / "published", f"--checkpoint={tmp_path / 'run'}")
    own = AutoTokenizer.from_pretrained(tmp_path / "published")
    export_to(tmp_path / "again", f"--weights={tmp_path / 'published'}")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == own.chat_template

    (tmp_path / "published" / "chat_template.jinja").unlink()
    with (
        naming(export.FLAG_OF_FIELD),
        pytest.raises(UserError, match=r"^--template is 'auto', .*, e.g. --template=hh$"),
    ):
        export_to(tmp_path / "none", f"--weights={tmp_path / 'published'}")
    export_to(tmp_path / "named", f"--weights={tmp_path / 'published'}", "--template=hh")
    opened = AutoTokenizer.from_pretrained(tmp_path / "named")
    dicts = [dataclasses.asdict(message) for message in DIALOGUE]
    ids = opened.apply_chat_template(dicts, add_generation_prompt=True, return_dict=False)
    assert ids == encode_prompt(own, DIALOGUE, "hh")
