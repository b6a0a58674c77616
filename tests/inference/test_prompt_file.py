"""Files of prompts: what is written as answers come, and how a killed run goes on."""

import json

import jax
import pytest

from jaxrm.data.records import Message
from jaxrm.errors import UserError
from jaxrm.inference.prompt_file import write_responses

PROMPTS = [[Message("user", name)] for name in "abcdef"]
KEY = jax.random.key(0)


class Answers:
    """Answers the later prompts first, with the prompt and its key, and is killed after so many."""

    def __init__(self, most=6):
        self.most, self.asked = most, []

    def answers(self, prompts, keys, slots):
        for place in reversed(range(len(prompts))):
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            self.asked.append(prompts[place][0].content)
            yield place, f"{prompts[place][0].content} {jax.random.key_data(keys[place]).tolist()}"


def test_a_killed_run_goes_on_from_what_it_has(tmp_path, capsys):
    """The file is then that of a run that was not killed; half a line that the kill left is drawn again."""
    write_responses(Answers(), PROMPTS, str(tmp_path / "whole.jsonl"), 4, KEY, {"seed": 0})
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with pytest.raises(KeyboardInterrupt):
        write_responses(Answers(most=4), PROMPTS, str(output), 4, KEY, {"seed": 0})
    assert not output.exists()
    part.write_text(part.read_text()[:-5])
    rest = Answers()
    write_responses(rest, PROMPTS, str(output), 2, KEY, {"seed": 0})
    assert rest.asked == ["c", "b", "a"] and not part.exists()
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [json.loads(line)["prompt"][0]["content"] for line in output.read_text().splitlines()] == list("abcdef")
    assert "6/6" in capsys.readouterr().err.replace(" ", "")


def test_responses_may_hold_other_line_separators(tmp_path):
    """Only a newline ends a row that is kept; the kill may have cut the last row inside a character."""
    text = "a\u2028b\u2029c\u0085d\x1ce\x0bf\rg"
    prompts = [[Message("user", f"{name}{text}")] for name in "abc"]
    write_responses(Answers(), prompts, str(tmp_path / "whole.jsonl"), 4, KEY, {})
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with pytest.raises(KeyboardInterrupt):
        write_responses(Answers(most=2), prompts, str(output), 4, KEY, {})
    content = part.read_bytes()
    part.write_bytes(content[: content.rindex("\u2028".encode()) + 1])
    rest = Answers()
    write_responses(rest, prompts, str(output), 4, KEY, {})
    assert len(rest.asked) == 2 and output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_responses_of_other_options_are_not_gone_on_with(tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_responses(Answers(most=2), PROMPTS, str(output), 4, KEY, {"seed": 0})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for prompts, seed, other in ((PROMPTS, 1, "seed"), (PROMPTS[:5], 0, "prompts")):
        with pytest.raises(UserError, match=rf"out.jsonl.part has .* other {other}; .* --output=responses.jsonl"):
            write_responses(Answers(), prompts, str(output), 4, KEY, {"seed": seed})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_standard_output_has_the_order_of_the_prompts(capsys):
    write_responses(Answers(), PROMPTS, None, 4, KEY, {})
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"][0]["content"] for line in lines] == list("abcdef")
