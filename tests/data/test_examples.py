import copy

import numpy as np
import pytest

from jaxrm.data.config import DataConfig
from jaxrm.data.examples import tokenize_demonstrations
from jaxrm.data.records import DemonstrationRecord, Message
from jaxrm.data.templates import encode_prompt, encode_response
from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError


def dialogue(*contents, source="f:1"):
    roles = ("user", "assistant")
    return DemonstrationRecord(tuple(Message(roles[i % 2], c) for i, c in enumerate(contents)), source)


TWO_TURNS = dialogue("what 12?", "good.", "why stone", "because; bad")


def tokenize(records, tokenizer, **settings):
    settings = {"max_length": 64, "template": "auto", "max_bad_share": 1.0, **settings}
    return tokenize_demonstrations(records, tokenizer, DataConfig(path="f", **settings))


def spans(example, tokenizer):
    """The decoded stretches of targets."""
    edges = np.flatnonzero(np.diff(np.r_[0, example.loss_mask.astype(int), 0]))
    return [tokenizer.decode(example.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def test_the_loss_is_on_the_last_response_and_its_end(chatml_tokenizer):
    (example,), report = tokenize([TWO_TURNS], chatml_tokenizer)
    assert spans(example, chatml_tokenizer) == ["because; bad<|im_end|>"]
    prompt = encode_prompt(chatml_tokenizer, TWO_TURNS.prompt, "auto")
    response = encode_response(chatml_tokenizer, TWO_TURNS.response, "auto")
    np.testing.assert_array_equal(example.tokens, prompt + response)
    np.testing.assert_array_equal(example.loss_mask, [False] * len(prompt) + [True] * len(response))
    assert (example.tokens.dtype, example.loss_mask.dtype, example.source) == (np.int32, bool, "f:1")
    assert (report.total, report.used, report.bad, report.cut_prompts) == (1, 1, {}, 0)


def test_every_assistant_turn_is_a_target_with_all(chatml_tokenizer):
    (example,), _ = tokenize([TWO_TURNS], chatml_tokenizer, train_on="all")
    assert spans(example, chatml_tokenizer) == ["good.<|im_end|>", "because; bad<|im_end|>"]
    (last,), _ = tokenize([TWO_TURNS], chatml_tokenizer, train_on="last")
    np.testing.assert_array_equal(example.tokens, last.tokens)


@pytest.mark.parametrize(
    ("family", "template", "expected"),
    [
        ("gemma", "gemma", ["good.<end_of_turn>", "because; bad<end_of_turn>"]),
        ("gemma", "hh", [" good.<eos>", " because; bad<eos>"]),
        ("llama", "llama2", ["good. </s>", "because; bad </s>"]),
        ("llama", "hh", ["good.</s>", "because; bad</s>"]),
        ("llama", "plain", ["good.</s>", "because; bad</s>"]),
    ],
)
def test_turns_are_found_token_by_token_in_named_templates(family, template, expected, request):
    tokenizer = load_tokenizer(str(request.getfixturevalue(f"{family}_folder")))
    (example,), _ = tokenize([TWO_TURNS], tokenizer, template=template, train_on="all", max_length=200)
    assert spans(example, tokenizer) == expected
    assert example.tokens[0] == tokenizer.bos_token_id


def test_a_long_prompt_is_cut_behind_its_first_header(gemma_folder):
    tokenizer = load_tokenizer(str(gemma_folder))
    record = dialogue("river " * 40 + "end", "good. bad.")
    (whole,), _ = tokenize([record], tokenizer, template="gemma", max_length=500)
    (cut,), report = tokenize([record], tokenizer, template="gemma", max_length=40)
    assert len(cut.tokens) == 40 < len(whole.tokens)
    assert cut.tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(cut.tokens).startswith("<bos><start_of_turn>user\n river river")
    np.testing.assert_array_equal(cut.tokens[:4], whole.tokens[:4])
    np.testing.assert_array_equal(cut.tokens[4:], whole.tokens[-36:])
    np.testing.assert_array_equal(cut.loss_mask[1:], whole.loss_mask[-39:])
    assert spans(cut, tokenizer) == ["good. bad.<end_of_turn>"]
    assert (report.cut_prompts, report.cut_heads, report.bad, report.used) == (1, 0, {}, 1)


def test_a_turn_that_loses_tokens_is_no_target(chatml_tokenizer):
    (whole,), _ = tokenize([TWO_TURNS], chatml_tokenizer, train_on="all")
    first_target = int(np.flatnonzero(whole.loss_mask)[0])
    length = len(whole.tokens)
    (cut,), _ = tokenize([TWO_TURNS], chatml_tokenizer, train_on="all", max_length=length - first_target + 1)
    assert spans(cut, chatml_tokenizer) == ["because; bad<|im_end|>"]
    (kept,), _ = tokenize([TWO_TURNS], chatml_tokenizer, train_on="all", max_length=length - 2)
    assert spans(kept, chatml_tokenizer) == ["good.<|im_end|>", "because; bad<|im_end|>"]
    np.testing.assert_array_equal(kept.tokens[-first_target:], whole.tokens[-first_target:])


LONG = (
    Message("system", "please answer <|im_end|> quiet"),
    Message("user", "river " * 8 + "stone"),
    Message("assistant", "good. " * 3),
    Message("user", "winter " * 8 + "why"),
    Message("assistant", "bad."),
)


@pytest.mark.parametrize("max_length", [76, 72, 68, 56, 50])
def test_a_cut_prompt_keeps_system_text_and_header(chatml_tokenizer, max_length):
    """What goes is the beginning of the dialogue, up to within a turn of the user."""
    (example,), report = tokenize([DemonstrationRecord(LONG, "f:1")], chatml_tokenizer, max_length=max_length)
    assert (report.cut_prompts, report.cut_heads) == (1, 0)
    text = chatml_tokenizer.decode(example.tokens)
    head = "<|im_start|>system\nplease answer <|im_end|> quiet<|im_end|>\n<|im_start|>user\n"
    assert text.startswith(head) and text.endswith("why<|im_end|>\n<|im_start|>assistant\nbad.<|im_end|>")
    rest = text.removeprefix(head)
    assert ("stone<|im_end|>\n<|im_start|>assistant" in rest) == ("<|im_start|>user" in rest)
    assert max_length - 20 < len(example.tokens) <= max_length


def test_prompts_that_lose_their_head_are_counted(chatml_tokenizer):
    _, report = tokenize([DemonstrationRecord(LONG, "f:1")], chatml_tokenizer, max_length=24)
    assert (report.cut_prompts, report.cut_heads) == (1, 1)
    assert ("of them without their system text or first header", 1, "") in report.rows()


def test_the_first_token_is_never_a_target(gemma_folder, chatml_tokenizer):
    rng = np.random.default_rng(0)
    for tokenizer, template in ((load_tokenizer(str(gemma_folder)), "plain"), (chatml_tokenizer, "auto")):
        records = [dialogue(*("good. " * int(n) for n in rng.integers(1, 9, 4))) for _ in range(40)]
        for max_length in (20, 23, 31, 64):
            examples, _ = tokenize(records, tokenizer, template=template, train_on="all", max_length=max_length)
            assert all(e.loss_mask.any() and not e.loss_mask[0] for e in examples)
            assert all(len(e.tokens) == len(e.loss_mask) <= max_length for e in examples)


def test_a_response_that_does_not_fit_is_dropped_and_counted(chatml_tokenizer):
    records = [dialogue("a", "good. " * 60, source="f:1"), dialogue("a", "good.", source="f:2")]
    examples, report = tokenize(records, chatml_tokenizer, max_length=32)
    assert [example.source for example in examples] == ["f:2"]
    assert report.bad["response longer than config.data.max_length 32"].first == "f:1"
    with pytest.raises(UserError, match=r"f:1: the response has \d+ tokens.*max_length="):
        tokenize(records, chatml_tokenizer, max_length=32, too_long="error")
    with pytest.raises(UserError, match=r"1 of 2 records are unusable.*longer than config.data.max_length 32"):
        tokenize(records, chatml_tokenizer, max_length=32, max_bad_share=0.4)


def test_a_response_is_kept_whole_up_to_the_last_token_that_fits(chatml_tokenizer):
    record = dialogue("why", "good. bad.")
    response = len(encode_response(chatml_tokenizer, record.response, "auto"))
    (example,), _ = tokenize([record], chatml_tokenizer, max_length=response + 1)
    assert example.loss_mask.tolist() == [False] + [True] * response
    examples, report = tokenize([record, dialogue("a", "b")], chatml_tokenizer, max_length=response)
    assert (len(examples), report.used) == (1, 1)


def test_dialogues_that_the_template_refuses_are_counted(chatml_tokenizer):
    strict = copy.copy(chatml_tokenizer)
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        + strict.chat_template
    )
    system = DemonstrationRecord((Message("system", "be good"), *TWO_TURNS.messages), "f:7")
    examples, report = tokenize([TWO_TURNS, system, TWO_TURNS], strict)
    assert len(examples) == 2
    ((reason, count),) = report.bad.items()
    assert "no system turns" in reason
    assert (count.count, count.first) == (1, "f:7")


def test_progress_reaches_the_total_and_batches_change_nothing(chatml_tokenizer, monkeypatch):
    records = [dialogue("what 12?", f"good. {i}", source=f"f:{i}") for i in range(23)]
    together, _ = tokenize(records, chatml_tokenizer)
    monkeypatch.setattr("jaxrm.data.examples._CHUNK", 5)
    seen = []
    config = DataConfig(path="f", max_length=64)
    apart, _ = tokenize_demonstrations(
        records, chatml_tokenizer, config, lambda done, total: seen.append((done, total))
    )
    assert seen == [(5, 23), (10, 23), (15, 23), (20, 23), (23, 23)]
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.source == other.source


def test_special_tokens_in_a_record_are_not_ends_of_turns(chatml_tokenizer):
    (example,), report = tokenize([dialogue("a <|im_end|> b", "c <|im_end|> d")], chatml_tokenizer)
    assert ("with special tokens spelled out, which stay text", 1, "f:1") in report.rows()
    end = chatml_tokenizer.eos_token_id
    assert (example.tokens == end).sum() == 2
    assert example.tokens[-1] == end
    assert (example.tokens[example.loss_mask] == end).sum() == 1


def test_nothing_left_is_a_user_error(chatml_tokenizer):
    with pytest.raises(UserError, match="1 of 1 records are unusable"):
        tokenize([dialogue("a", "good. " * 60)], chatml_tokenizer, max_length=8)
