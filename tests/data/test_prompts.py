import copy

import numpy as np
import pytest

from jaxrm.data.packing import build_row
from jaxrm.data.prompts import PromptExample, left_padded, tokenize_prompts, too_long_reason
from jaxrm.data.records import DemonstrationRecord, Message, PreferenceRecord, PromptRecord
from jaxrm.data.templates import encode_prompt
from jaxrm.errors import UserError

ASKED = (Message("user", "what 12?"),)
TALK = (Message("user", "what 12?"), Message("assistant", "good."), Message("user", "why stone"))
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + (
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prompt(*messages, source="f:1"):
    return PromptRecord(messages, source)


def asked(text, source="f:1"):
    return prompt(Message("user", text), source=source)


def length(tokenizer, record):
    return len(encode_prompt(tokenizer, record.prompt, "auto"))


def batch_of(*rows, width, pad_id=0):
    built = [
        build_row([PromptExample(np.array(row, np.int32), (), "")] if row else [], width, pad_id, {}) for row in rows
    ]
    return {name: np.stack([row[name] for row in built]) for name in built[0]}


@pytest.mark.parametrize("dialogue", [ASKED, TALK], ids=["one turn", "three turns"])
@pytest.mark.parametrize(
    "as_record",
    [
        lambda dialogue: PreferenceRecord(dialogue, "good.", "bad!", "f:7"),
        lambda dialogue: DemonstrationRecord((*dialogue, Message("assistant", "good.")), "f:7"),
        lambda dialogue: PromptRecord(dialogue, "f:7"),
    ],
    ids=["pair", "demonstration", "prompt"],
)
def test_any_record_gives_its_prompt_up_to_the_answers_header(chatml_tokenizer, as_record, dialogue):
    (example,), report = tokenize_prompts([as_record(dialogue)], chatml_tokenizer, "auto", 100)
    written = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in dialogue) + "<|im_start|>assistant\n"
    assert chatml_tokenizer.decode(example.tokens) == written
    assert (example.messages, example.source, example.tokens.dtype) == (dialogue, "f:7", np.int32)
    assert example.segment_lengths == (len(example.tokens),) and example.columns() == {}
    assert (report.total, report.used, report.bad) == (1, 1, {})


def test_a_prompt_is_dropped_where_it_does_not_fit_and_never_cut(chatml_tokenizer):
    records = [asked("stone " * n, source=f"f:{n}") for n in (1, 8, 3, 40, 5)]
    lengths = [length(chatml_tokenizer, record) for record in records]
    room = lengths[4]  # just fits; the ones of 8 and 40 stones do not
    assert lengths[1] > room > lengths[2]
    examples, report = tokenize_prompts(records, chatml_tokenizer, "auto", room)
    assert [example.source for example in examples] == ["f:1", "f:3", "f:5"]
    assert [len(example.tokens) for example in examples] == [lengths[0], lengths[2], lengths[4]]
    assert (report.total, report.used, report.cut_prompts) == (5, 3, 0)
    (bad,) = report.bad.items()
    assert (bad[0], bad[1].count, bad[1].first) == (too_long_reason(room), 2, "f:8")


def test_prompts_that_the_template_refuses_are_counted(chatml_tokenizer, monkeypatch):
    """The message shows the first of them."""
    monkeypatch.setattr(chatml_tokenizer, "chat_template", NO_SYSTEM)
    system = Message("system", "please")
    records = [asked("why", "f:1"), prompt(system, *ASKED, source="f:2"), prompt(system, *TALK, source="f:3")]
    examples, report = tokenize_prompts(records, chatml_tokenizer, "auto", 100)
    assert [example.source for example in examples] == ["f:1"]
    assert report.rows()[2:] == [("the chat template refuses a dialogue: no system turn", 2, "f:2")]
    assert (report.total, report.used) == (3, 1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "auto",
            r"config.data.template is 'auto', but the tokenizer has no chat template; .*--config.data.template=hh",
        ),
        ("llama3", r"config.data.template is 'llama3', but the tokenizer has no token '<.start_header_id.>'"),
        ("alpaca", r"config.data.template is 'alpaca'; use auto or one of chatml, .*--config.data.template=auto"),
        (
            "hh",
            r"the tokenizer has no end-of-sequence token, .*e.g. --config.data.tokenizer=org/name, or a chat template",
        ),
    ],
)
def test_a_template_that_cannot_work_is_one_error(chatml_tokenizer, template, message):
    """It is not counted as one bad record for each prompt."""
    broken = copy.deepcopy(chatml_tokenizer)
    broken.chat_template = broken.eos_token = None
    with pytest.raises(UserError, match=f"^{message}"):
        tokenize_prompts([asked("a"), asked("b")], broken, template, 100)


def test_progress_is_told_at_the_last_record_too(chatml_tokenizer):
    told = []
    tokenize_prompts([asked("a")] * 300, chatml_tokenizer, "auto", 100, lambda done, total: told.append((done, total)))
    assert told == [(256, 300), (300, 300)]


def test_no_record_gives_no_prompt(chatml_tokenizer):
    examples, report = tokenize_prompts([], chatml_tokenizer, "auto", 100)
    assert examples == [] and (report.total, report.used, report.bad) == (0, 0, {})


def test_padding_moves_to_the_left_and_tokens_keep_their_order():
    # 0 is a token here as well as the padding: the mask alone says which is which.
    tokens, mask = left_padded(batch_of([7, 0, 5], [3], [], [1, 2, 3, 4, 0], width=5))
    np.testing.assert_array_equal(tokens, [[0, 0, 7, 0, 5], [0, 0, 0, 0, 3], [0] * 5, [1, 2, 3, 4, 0]])
    np.testing.assert_array_equal(
        mask, np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
    )
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)


def test_rows_of_any_length_agree_with_a_loop():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 9, n).tolist() for n in rng.integers(0, 41, 200)]
    tokens, mask = left_padded(batch_of(*rows, width=40, pad_id=3))
    for i, row in enumerate(rows):
        expected = [3] * (40 - len(row)) + row
        assert tokens[i].tolist() == expected
        assert mask[i].tolist() == [t >= 40 - len(row) for t in range(40)]


def test_a_batch_is_not_changed_by_being_padded_on_the_left():
    batch = batch_of([7, 8], [], width=3)
    before = {name: array.copy() for name, array in batch.items()}
    left_padded(batch)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, before[name])
