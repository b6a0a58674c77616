"""Prompts and responses under what the templates of published models do."""

import copy
import datetime

import numpy as np
import pytest
from support.published import PUBLISHED, published_tokenizer

from jaxrm.data.config import DataConfig
from jaxrm.data.examples import tokenize_demonstrations
from jaxrm.data.exported_template import set_exported_template
from jaxrm.data.pair_examples import comparison_examples, mapping_examples
from jaxrm.data.pairs import correction_request, tokenize_pairs
from jaxrm.data.prompts import tokenize_prompts
from jaxrm.data.records import DemonstrationRecord, Message, PreferenceRecord, PromptRecord
from jaxrm.data.templates import bos_id, encode_prompt, encode_response, end_ids
from jaxrm.errors import UserError

FAMILIES = sorted(PUBLISHED)
SYSTEM = Message("system", "ALWAYS ANSWER IN FRENCH")
HELLO = Message("user", "hello")
TALK = (HELLO, Message("assistant", "good"), Message("user", "why 12?"))
DIALOGUES = {
    "user": (HELLO,),
    "system": (SYSTEM, HELLO),
    "talk": TALK,
    "system and talk": (SYSTEM, *TALK),
    "white space": (Message("user", " \n hello\n"), Message("assistant", " good \n"), Message("user", "\twhy ")),
    "unicode": (Message("user", "¼ naïve 日本語 😀 don't"),),
}
# What transformers renders of a system and a user's turn, recorded: without it a mistake in the templates themselves,
# which are written anew for these tests, would not be seen.
RENDERED = {
    "llama2": "<s>[INST] <<SYS>>\nALWAYS ANSWER IN FRENCH\n<</SYS>>\n\nhello [/INST]",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nALWAYS ANSWER IN FRENCH<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama3.1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\nALWAYS ANSWER IN FRENCH<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhello"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral_v0.3": "<s>[INST] ALWAYS ANSWER IN FRENCH\n\nhello[/INST]",
    "mistral_nemo": "<s>[INST]ALWAYS ANSWER IN FRENCH\n\nhello[/INST]",
    "gemma3": "<bos><start_of_turn>user\nALWAYS ANSWER IN FRENCH\n\nhello<end_of_turn>\n<start_of_turn>model\n",
    "r1_distill": "<｜begin▁of▁sentence｜>ALWAYS ANSWER IN FRENCH<｜User｜>hello<｜Assistant｜><think>\n",
    **dict.fromkeys(
        ("qwen2.5", "qwen3", "smollm2", "chatml"),
        "<|im_start|>system\nALWAYS ANSWER IN FRENCH<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
}
RENDERED["llama3.2"] = RENDERED["llama3.1"]
THOUGHT = "<think>\nbecause 12\n</think>\n\ngood"


def by_transformers(tokenizer, messages, **options):
    dicts = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer.apply_chat_template(dicts, return_dict=False, date_string="26 Jul 2024", **options)


def response_of(family):
    return THOUGHT if family == "r1_distill" else "good. bad"


@pytest.mark.parametrize("dialogue", sorted(DIALOGUES))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_what_transformers_gives(family, dialogue):
    tokenizer, messages = published_tokenizer(family), DIALOGUES[dialogue]
    if family == "gemma1" and messages[0].role == "system":
        with pytest.raises(UserError, match=r"^the chat template refuses a dialogue: System role not supported$"):
            encode_prompt(tokenizer, messages, "auto")
        return
    expected = by_transformers(tokenizer, messages, add_generation_prompt=True)
    assert encode_prompt(tokenizer, messages, "auto") == expected
    (example,), report = tokenize_prompts([PromptRecord(messages, "f:1")], tokenizer, "auto", 500)
    assert example.tokens.tolist() == expected
    assert not report.bad


@pytest.mark.parametrize("family", sorted(RENDERED))
def test_a_prompt_is_as_recorded(family):
    tokenizer = published_tokenizer(family)
    assert tokenizer.decode(encode_prompt(tokenizer, DIALOGUES["system"], "auto")) == RENDERED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_is_what_the_template_writes(family):
    """Where the whole dialogue begins with the prompt. R1's does not: it drops the thought that its prompt opens."""
    tokenizer = published_tokenizer(family)
    prompt, response = encode_prompt(tokenizer, TALK, "auto"), encode_response(tokenizer, response_of(family), "auto")
    if family == "r1_distill":
        assert tokenizer.decode(response) == "because 12\n</think>\n\ngood<｜end▁of▁sentence｜>"
    else:
        whole = by_transformers(tokenizer, [*TALK, Message("assistant", response_of(family))])
        assert whole[: len(prompt) + len(response)] == prompt + response
        assert tokenizer.decode(whole[len(prompt) + len(response) :]).strip() == ""
    assert response[-1] in end_ids(tokenizer, "auto")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_training_sees_the_prompt_of_generation(family):
    tokenizer, config = published_tokenizer(family), DataConfig(path="f", max_length=400, max_bad_share=0.0)
    messages = TALK if family == "gemma1" else (SYSTEM, *TALK)
    prompt = encode_prompt(tokenizer, messages, "auto")
    good = response_of(family)
    bad = good.replace("good", "bad")
    chosen, rejected = (encode_response(tokenizer, text, "auto") for text in (good, bad))
    request = correction_request(tokenizer, "auto", "again")
    first_id = bos_id(tokenizer, "auto")

    (example,), _ = tokenize_demonstrations(
        [DemonstrationRecord((*messages, Message("assistant", good)), "f:1")], tokenizer, config
    )
    assert example.tokens.tolist() == prompt + chosen
    assert example.tokens[example.loss_mask].tolist() == chosen
    pairs, _ = tokenize_pairs([PreferenceRecord(messages, good, bad, "f:1")], tokenizer, config)
    assert [pairs[0].prompt.tolist(), pairs[0].chosen.tolist(), pairs[0].rejected.tolist()] == [
        prompt,
        chosen,
        rejected,
    ]
    (comparison,), _ = comparison_examples(pairs, config, first_id=first_id)
    assert comparison.tokens.tolist() == prompt + chosen + prompt + rejected
    (correction, identity), _ = mapping_examples(pairs, request, config, first_id=first_id)
    assert correction.tokens.tolist() == prompt + rejected + request + chosen
    assert identity.tokens.tolist() == prompt + chosen + request + chosen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_turn_stands_behind_its_own_prompt(family):
    """Mistral moves the system text, Qwen 3 drops earlier thoughts: such turns have a row of their own."""
    tokenizer = published_tokenizer(family)
    config = DataConfig(path="f", max_length=400, max_bad_share=0.0, train_on="all")
    good = response_of(family)
    system = () if family == "gemma1" else (SYSTEM,)
    messages = (*system, HELLO, Message("assistant", good), HELLO, Message("assistant", good))
    examples, report = tokenize_demonstrations([DemonstrationRecord(messages, "f:1")], tokenizer, config)
    own_row = family in ("mistral_v0.3", "mistral_nemo", "qwen3", "r1_distill")
    assert (len(examples), report.used) == (1 + own_row, 1)
    response = encode_response(tokenizer, good, "auto")
    seen = []
    for example in examples:
        edges = np.flatnonzero(np.diff(np.r_[0, example.loss_mask.astype(int), 0]))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            assert example.tokens[start:stop].tolist() == response
            seen.append(example.tokens[:start].tolist())
    prompts = [encode_prompt(tokenizer, messages[:end], "auto") for end in (len(messages) - 3, len(messages) - 1)]
    assert sorted(seen) == sorted(prompts)


def test_thoughts_under_qwen_3():
    tokenizer = published_tokenizer("qwen3")

    def written(text):
        return tokenizer.decode(encode_response(tokenizer, text, "auto"))

    assert written(THOUGHT) == THOUGHT + "<|im_end|>"
    assert written("<think>because 12</think>good") == THOUGHT + "<|im_end|>"
    assert written("good") == "<think>\n\n</think>\n\ngood<|im_end|>"
    ids = encode_response(tokenizer, THOUGHT, "auto")
    assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    with pytest.raises(UserError, match="leaves out or changes some of the text of a response"):
        written("<think>a</think>b</think>c")


def test_thoughts_under_r1():
    """The prompt has opened the thought, so a response goes on from there, as generation does."""
    tokenizer = published_tokenizer("r1_distill")
    expected = "because 12\n</think>\n\ngood<｜end▁of▁sentence｜>"
    for text in (THOUGHT, "because 12\n</think>\n\ngood", "<think>because 12\n</think>\n\ngood"):
        assert tokenizer.decode(encode_response(tokenizer, text, "auto")) == expected
    with pytest.raises(UserError, match=r"without '</think>', but the chat template opens every one with '<think>"):
        encode_response(tokenizer, "good", "auto")
    _, report = tokenize_pairs(
        [PreferenceRecord((HELLO,), THOUGHT, "good", "f:1"), PreferenceRecord((HELLO,), THOUGHT, "a</think>b", "f:2")],
        tokenizer,
        DataConfig(path="f", max_bad_share=1.0),
    )
    ((reason, count),) = report.bad.items()
    assert "'</think>'" in reason and (count.count, count.first) == (1, "f:1")


@pytest.mark.parametrize("family", ["qwen3", "r1_distill"])
def test_earlier_thoughts_go_as_the_template_means_it(family):
    tokenizer = published_tokenizer(family)
    messages = (HELLO, Message("assistant", THOUGHT), HELLO)
    ids = encode_prompt(tokenizer, messages, "auto")
    assert ids == by_transformers(tokenizer, messages, add_generation_prompt=True)
    assert "because" not in tokenizer.decode(ids)


def test_the_day_is_not_in_the_tokens(monkeypatch):
    """``strftime_now`` gives one day for ever: the one that Llama 3's templates fall back to."""
    tokenizer = published_tokenizer("llama3.2")

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert "02 Jan 2031" in tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert "Today Date: 26 Jul 2024\n" in tokenizer.decode(encode_prompt(tokenizer, (HELLO,), "auto"))


def exported(name, template, folder):
    """The tokenizer of an exported model, as `transformers` opens it."""
    from transformers import AutoTokenizer

    tokenizer = copy.copy(published_tokenizer(name))
    set_exported_template(tokenizer, template)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "template"),
    [
        *((family, "auto") for family in ("llama3.1", "mistral_v0.3", "qwen3", "r1_distill")),
        *((family, "hh") for family in ("smollm2", "llama2", "gemma3", "r1_distill")),
        ("chatml", "chatml"),
        ("llama3", "llama3"),
        ("llama2", "llama2"),
        ("gemma3", "gemma"),
        ("mistral_nemo", "plain"),
    ],
)
def test_an_exported_template_writes_what_was_trained_with(family, template, tmp_path):
    tokenizer, opened = published_tokenizer(family), exported(family, template, tmp_path)
    for messages in DIALOGUES.values():
        dicts = [{"role": message.role, "content": message.content} for message in messages]
        ids = opened.apply_chat_template(dicts, add_generation_prompt=True, return_dict=False)
        assert ids == encode_prompt(tokenizer, messages, template) == encode_prompt(opened, messages, "auto")
    response = response_of(family)
    assert encode_response(opened, response, "auto") == encode_response(tokenizer, response, template)
    assert end_ids(opened, "auto") == end_ids(tokenizer, template)


def test_an_exported_template_keeps_the_day_of_training(tmp_path):
    opened = exported("llama3.2", "auto", tmp_path)
    ids = opened.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)["input_ids"]
    assert ids == encode_prompt(published_tokenizer("llama3.2"), (HELLO,), "auto")


def test_an_export_keeps_the_templates_that_have_names(tmp_path):
    tokenizer = copy.copy(published_tokenizer("chatml"))
    tokenizer.chat_template = {"rag": tokenizer.chat_template, "default": "{{ messages }}"}
    set_exported_template(tokenizer, "hh")
    assert sorted(tokenizer.chat_template) == ["default", "rag"]
    assert "Human" in tokenizer.chat_template["default"]


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_prompts_keep_system_text_and_header(family):
    """Whatever the length: what is left is the head and the end of the dialogue, from within a turn of the user."""
    tokenizer = published_tokenizer(family)
    system = () if family == "gemma1" else (SYSTEM,)
    turns = [Message("user", "river stone " * 9 + "why"), Message("assistant", "good. " * 5)] * 2
    messages = (*system, *turns, Message("user", "what is the river " * 6))
    whole = tokenizer.decode(encode_prompt(tokenizer, messages, "auto"))
    head = whole[: min(whole.index("river stone"), whole.index(SYSTEM.content) if "mistral" in family else 10**6)]
    response = response_of(family)
    least = len(tokenizer(head + SYSTEM.content + response)["input_ids"]) + 24  # the header of the response too
    record = DemonstrationRecord((*messages, Message("assistant", response)), "f:1")
    for max_length in range(least, len(tokenizer(whole + response)["input_ids"]) + 9, 7):
        config = DataConfig(path="f", max_length=max_length, max_bad_share=0.0)
        (example,), report = tokenize_demonstrations([record], tokenizer, config)
        prompt = tokenizer.decode(example.tokens[~example.loss_mask])
        assert len(example.tokens) <= max_length
        assert report.cut_heads == 0
        assert prompt.startswith(head) and (not system or SYSTEM.content in prompt)
        rest = prompt.removeprefix(head)
        if "mistral" in family and rest.startswith(SYSTEM.content):  # there it stands in the last turn
            rest = rest.removeprefix(f"{SYSTEM.content}\n\n")
        assert whole.endswith(rest) and (prompt == whole) == (report.cut_prompts == 0)
