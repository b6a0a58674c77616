import random

import pytest

from jaxrm.data.records import DemonstrationRecord, Message, PreferenceRecord, PromptRecord, as_demonstration
from jaxrm.data.schemas import SCHEMAS, BadRecordError, parse, recognize
from jaxrm.errors import UserError

USER = {"role": "user", "content": "why?"}
GOOD = {"role": "assistant", "content": "good."}
BAD = {"role": "assistant", "content": "bad."}
ASKED = (Message("user", "why?"),)
PAIR = PreferenceRecord(ASKED, "good.", "bad.", "f:1")
PKU = {"prompt": "why?", "response_0": "bad.", "response_1": "good.", "better_response_id": 1, "safer_response_id": 0}
TLDR = {
    "info": {"id": "t", "post": " long post ", "title": "a title", "subreddit": "stones", "site": None},
    "summaries": [{"text": " bad.", "policy": "x"}, {"text": " good.", "policy": "y"}],
    "choice": 1,
    "worker": "w",
}


def read(fields, schema=None, preferred="better_response_id"):
    return parse(schema or recognize(fields), fields, "f:1", preferred)


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        ("preference", {"prompt": "why?", "chosen": "good.", "rejected": "bad.", "extra": 3}),
        ("preference", {"prompt": [USER], "chosen": "good.", "rejected": "bad."}),
        (
            "ultrafeedback",
            {"prompt": "why?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        ),
        ("ultrafeedback", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}),
        ("ultrafeedback", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}),
        ("hh", {"chosen": "\n\nHuman: why?\n\nAssistant: good.", "rejected": "\n\nHuman: why?\n\nAssistant: bad."}),
        ("pku_safe_rlhf", PKU),
    ],
)
def test_preferences_are_recognised_and_read(schema, fields):
    assert recognize(fields) == schema
    assert read(fields) == PAIR


def test_messages_demonstrations_and_prompts_are_recognized():
    answered = DemonstrationRecord((*ASKED, Message("assistant", "good.")), "f:1")
    assert read({"messages": [USER, GOOD]}) == answered
    parts = {"role": "assistant", "content": [{"type": "text", "text": "go"}, {"type": "text", "text": "od."}]}
    assert read({"messages": [{"role": "system", "content": ""}, USER, parts]}) == answered
    assert read({"prompt": "why?", "response": "good."}) == answered
    assert read({"prompt": "why?", "completion": "good."}) == answered
    assert read({"prompt": [USER], "completion": [GOOD]}) == answered
    assert read({"instruction": "why?", "input": "", "output": "good."}) == answered
    assert read({"instruction": "why?", "input": "this", "output": "good."}).prompt[0].content == "why?\n\nthis"
    assert read({"prompt": "why?"}) == PromptRecord(ASKED, "f:1") == read({"prompt": [USER]})
    assert as_demonstration(PAIR) == answered == as_demonstration(answered)
    with pytest.raises(UserError, match="f:1: a prompt without a response"):
        as_demonstration(PromptRecord(ASKED, "f:1"))
    assert (answered.prompt, answered.response) == (ASKED, "good.")


def test_transcript_of_several_turns_shares_all_but_the_last():
    shared = "\n\nHuman: one\n\nAssistant: two\n\nstill two\n\nHuman: three\n\nAssistant:"
    record = read({"chosen": shared + " good.\n", "rejected": shared + " bad."})
    assert [m.role for m in record.prompt] == ["user", "assistant", "user"]
    assert record.prompt[1].content == "two\n\nstill two"
    assert (record.chosen, record.rejected) == ("good.", "bad.")


def test_pku_label_is_the_one_asked_for():
    assert read(PKU, preferred="safer_response_id").chosen == "bad."
    assert read(PKU, preferred="better_response_id").chosen == "good."


def test_tldr_prompt_ends_where_the_summary_begins():
    record = read(TLDR)
    assert record.prompt == (Message("user", "SUBREDDIT: r/stones\n\nTITLE: a title\n\nPOST: long post\n\nTL;DR:"),)
    assert (record.chosen, record.rejected) == (" good.", " bad.")
    article = read({**TLDR, "info": {"article": "news", "post": None}, "choice": 0})
    assert article.prompt[0].content == "ARTICLE: news\n\nTL;DR:"
    assert article.chosen == " bad."


@pytest.mark.parametrize(
    ("schema", "fields", "reason"),
    [
        ("preference", ["not", "a", "dict"], "not an object"),
        ("preference", {"prompt": "a", "chosen": "b"}, "missing field 'rejected'"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": None}, "missing field 'rejected'"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": " \n"}, "'rejected' is empty"),
        ("preference", {"prompt": 3, "chosen": "b", "rejected": "c"}, "'prompt' is not text"),
        ("preference", {"prompt": "\ud800", "chosen": "b", "rejected": "c"}, "not valid Unicode"),
        ("preference", {"prompt": [], "chosen": "b", "rejected": "c"}, "not a list of messages"),
        ("preference", {"prompt": [USER, GOOD], "chosen": "b", "rejected": "c"}, "prompt ends with the assistant"),
        ("ultrafeedback", {"chosen": [USER, GOOD], "rejected": [GOOD, BAD]}, "differ before the last turn"),
        ("ultrafeedback", {"chosen": [USER], "rejected": [USER]}, "does not end with the assistant"),
        ("ultrafeedback", {"chosen": [GOOD], "rejected": [BAD]}, "missing field 'prompt'"),
        ("hh", {"chosen": "Human: a", "rejected": "b"}, "does not begin with a turn"),
        ("hh", {"chosen": "a", "rejected": "b"}, "no field 'prompt' or 'question' or 'instruction', and no transcript"),
        ("hh", {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "does not end with the assistant"),
        ("hh", {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "is empty"),
        ("hh", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}, "differ"),
        ("hh", {"chosen": "\n\nAssistant: b", "rejected": "\n\nAssistant: c"}, "no prompt"),
        ("pku_safe_rlhf", {**PKU, "better_response_id": 2}, "is not 0 or 1"),
        ("pku_safe_rlhf", {**PKU, "better_response_id": True}, "is not 0 or 1"),
        ("pku_safe_rlhf", {**PKU, "better_response_id": [1]}, "is not 0 or 1"),
        ("tldr", {**TLDR, "summaries": [{"text": "one"}]}, "not two"),
        ("tldr", {**TLDR, "summaries": ["one", "two"]}, "not objects"),
        ("tldr", {**TLDR, "info": {}}, "missing field 'article'"),
        ("messages", {"messages": [USER]}, "does not end with the assistant"),
        ("messages", {"messages": [GOOD]}, "has no prompt"),
        ("messages", {"messages": [{"role": "tool", "content": "x"}, GOOD]}, "a role other than"),
        ("messages", {"messages": [{"role": ["user"], "content": "x"}, GOOD]}, "a role other than"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}, GOOD]}, "other than text"),
        ("messages", {"messages": {"role": "user"}}, "not a list of messages"),
        ("messages", {"messages": [{"role": "system", "content": ""}]}, "is empty"),
        ("demonstration", {"instruction": "a", "input": 3, "output": "b"}, "'input' is not text"),
    ],
)
def test_a_bad_record_says_why(schema, fields, reason):
    with pytest.raises(BadRecordError, match=reason):
        read(fields, schema)


def garbage(rng, depth=0):
    choices = [
        None,
        True,
        0,
        1,
        -7,
        1e308,
        "",
        " ",
        "text",
        "\n\nHuman: a\n\nAssistant: b",
        "\udfff",
        "user",
        "assistant",
    ]
    if depth < 4:
        names = ["prompt", "chosen", "rejected", "messages", "role", "content", "info", "summaries", "choice", "text"]
        names += ["type", "response_0", "response_1", "better_response_id", "instruction", "output", "post"]
        choices += [[garbage(rng, depth + 1) for _ in range(rng.randint(0, 3))]] * 5
        choices += [{name: garbage(rng, depth + 1) for name in rng.sample(names, rng.randint(0, 9))}] * 8
    return rng.choice(choices)


def spoil(value, rng):
    """The value with garbage in place of one of its parts."""
    if rng.random() < 0.3 or not isinstance(value, dict | list) or not value:
        return garbage(rng, depth=3)
    if isinstance(value, dict):
        name = rng.choice(list(value))
        return {**value, name: spoil(value[name], rng)}
    index = rng.randrange(len(value))
    return [*value[:index], spoil(value[index], rng), *value[index + 1 :]]


def test_no_garbage_raises_anything_else():
    rng = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    whole = [PKU, TLDR, {"messages": [USER, GOOD]}, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}]
    for _ in range(600):
        fields = rng.choice([garbage(rng), *(spoil(row, rng) for row in whole)])
        for schema in SCHEMAS:
            try:
                read(fields, schema)
                outcomes["read"] += 1
            except BadRecordError:
                outcomes["refused"] += 1
        if isinstance(fields, dict):
            assert recognize(fields) in {None, *SCHEMAS}
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"tool_calls": [{"function": {"name": "add"}}]}, "'tool_calls', and tools are not read"),
        ({"function_call": {"name": "add"}}, "'function_call', and tools are not read"),
        ({"reasoning_content": "because"}, r"'reasoning_content', which is not read; write the thought .*<think>"),
        ({"thinking": "because"}, "'thinking', which is not read"),
        ({"weight": 0}, "'weight', which is not read; config.data.train_on"),
        ({"train": False}, "'train', which is not read"),
        (
            {"tool_calls": None, "tool_call_id": "", "weight": 1, "name": "Ann", "id": 7, "reasoning_content": None},
            None,
        ),
    ],
)
def test_keys_that_change_the_meaning_of_a_turn_are_named(extra, reason):
    question = {"role": "user", "content": "how"}
    rows = {
        "messages": {"messages": [question, {"role": "assistant", "content": "so", **extra}]},
        "ultrafeedback": {
            "chosen": [question, {"role": "assistant", "content": "so", **extra}],
            "rejected": [question, {"role": "assistant", "content": "or so"}],
        },
        "prompt": {"prompt": [{**question, **extra}]},
    }
    for schema, row in rows.items():
        if reason is None:
            assert parse(schema, row, "f:1", "better_response_id").prompt == (Message("user", "how"),)
        else:
            with pytest.raises(BadRecordError, match=reason):
                parse(schema, row, "f:1", "better_response_id")


@pytest.mark.parametrize("key", ["tools", "tool_calls", "reasoning_content", "chat_template_kwargs"])
def test_keys_beside_the_messages_are_named_too(key):
    row = {"messages": [{"role": "user", "content": "how"}, GOOD], key: [{"name": "add"}]}
    with pytest.raises(BadRecordError, match=key):
        parse("messages", row, "f:1", "better_response_id")


def test_a_response_labeled_false_is_not_imitated():
    fields = {"prompt": "hi", "completion": "go away", "label": False}
    with pytest.raises(BadRecordError, match="'label' is False"):
        parse("demonstration", fields, "file:1", "better_response_id")
    assert parse("demonstration", fields | {"label": True}, "file:1", "better_response_id").response == "go away"


@pytest.mark.parametrize("label", [0, 0.0, "False", "false", " FALSE", "0"])
def test_a_label_of_zero_or_text_is_false_too(label):
    fields = {"prompt": "hi", "completion": "go away", "label": label}
    with pytest.raises(BadRecordError, match="'label' is False"):
        parse("demonstration", fields, "file:1", "better_response_id")


@pytest.mark.parametrize("label", [True, 1, 1.0, "True", "true", "1", None, "", float("nan")])
def test_a_response_with_a_true_label_or_none_is_learned(label):
    fields = {"prompt": "hi", "completion": "hello", "label": label}
    assert parse("demonstration", fields, "file:1", "better_response_id").response == "hello"


@pytest.mark.parametrize("label", ["no", "bad", 2, -1, 0.5, "0.0", [False], {"value": 0}])
def test_a_label_that_is_neither_is_a_bad_record(label):
    fields = {"prompt": "hi", "completion": "go away", "label": label}
    with pytest.raises(BadRecordError, match="'label' is not true or false, nor 1 or 0; rename the field"):
        parse("demonstration", fields, "file:1", "better_response_id")
