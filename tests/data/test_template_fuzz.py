"""Templates and messages of any form: their ids, or one line; never a traceback, a hang, or a text that is lost."""

import copy
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzz import fuzz
from support.published import PUBLISHED, published_tokenizer

from jaxrm.data.layout import squeeze
from jaxrm.data.records import Message
from jaxrm.data.templates import encode_prompt, encode_response
from jaxrm.errors import UserError

PARTS = [
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ m.content }}",
    "{{ m.role + m.content | trim }}",
    "{{ m['content'].split('</think>')[-1] }}",
    "{{ m.content * 1000 }}",
    "{{ m.content ~ messages }}",
    "{% if m.role == 'user' %}",
    "{% if loop.last %}",
    "{% if add_generation_prompt %}",
    "{% elif m.role == 'assistant' %}",
    "{% else %}",
    "{% endif %}",
    "<|im_start|>",
    "<|im_end|>",
    "assistant\n",
    "<think>\n",
    "{{ bos_token }}",
    "{{ eos_token }}",
    "{{ messages[0].content }}",
    "{{ messages[-1]['content'] }}",
    "{{ messages }}",
    "{{ messages | tojson(indent=2) }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%d %b %Y') }}",
    "{% set ns = namespace(x='a') %}",
    "{% set ns.x = ns.x + ns.x %}",
    "{% set ns.x = ns.x ~ ns.x %}",
    "{{ ns.x }}",
    "{% for i in range(9999) %}",
    "{% for i in range(10 ** 9) %}",
    "{% for c in 'x' * 99999 %}",
    "{% macro f(n) %}",
    "{% endmacro %}",
    "{{ f(9) }}{{ f(9) }}",
    "{{ 'x' * 10 ** 12 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ '%99999999999d' % 1 }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ messages.append(messages) }}",
    "{{ [1, 2] | random }}",
    "{{ lipsum() }}",
    "{{ messages | map(attribute='content') | join(',') }}",
    "{% include 'x' %}",
    "{% extends messages %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% break %}",
    "{% raw %}",
    "{# ",
    "{%- ",
    " -%}",
    "{{ ",
    " }}",
    "\n",
]
CHATML = PUBLISHED["chatml"].template
templates = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=12).map("".join),
    st.lists(st.sampled_from(PARTS), max_size=3).map(lambda parts: "".join(parts) + CHATML),
    st.lists(st.sampled_from(PARTS), max_size=3).map(lambda parts: CHATML + "".join(parts)),
    st.tuples(st.integers(0, len(CHATML)), st.sampled_from(PARTS)).map(
        lambda cut: CHATML[: cut[0]] + cut[1] + CHATML[cut[0] :]
    ),
    st.text(max_size=40),
)
texts = st.one_of(
    st.sampled_from(["hello", "", " ", "a", "user", "<|im_end|>", "<think>a</think>b", "</think>", "[INST]", "\ud800"]),
    st.text(max_size=30),
)
dialogues = st.lists(
    st.builds(Message, st.sampled_from(["user", "assistant", "system"]), texts), min_size=1, max_size=5
)
QUESTION = [Message("user", "hello"), Message("assistant", "good"), Message("user", "why 12?")]


def ids_or_one_line(encode, *arguments):
    """Token ids, or None where they are refused in one line."""
    start = time.perf_counter()
    try:
        return encode(*arguments)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return None
    finally:
        assert time.perf_counter() - start < 60


def by_transformers(tokenizer, messages):
    dicts = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer.apply_chat_template(
        dicts, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
    )


@fuzz
@given(template=templates)
def test_fuzz_a_template_gives_its_ids_or_one_line(template):
    tokenizer = copy.copy(published_tokenizer("chatml"))
    tokenizer.chat_template = template
    ids = ids_or_one_line(encode_prompt, tokenizer, QUESTION, "auto")
    if ids is not None and "strftime_now" not in template:
        assert ids == by_transformers(tokenizer, QUESTION)
        rendered = squeeze(tokenizer.decode(ids))
        assert all(squeeze(message.content) in rendered for message in QUESTION)
    ids_or_one_line(encode_response, tokenizer, "good", "auto")


@pytest.mark.parametrize("family", sorted(PUBLISHED))
@fuzz
@given(messages=dialogues)
def test_fuzz_messages_give_their_ids_or_one_line(family, messages):
    tokenizer = published_tokenizer(family)
    ids = ids_or_one_line(encode_prompt, tokenizer, messages, "auto")
    control = [token.content for token in tokenizer.added_tokens_decoder.values()]
    if ids is not None and not any(token in message.content for token in control for message in messages):
        assert ids == by_transformers(tokenizer, messages)
    if ids is not None:
        text = squeeze(tokenizer.decode(ids))
        for message in messages:
            content = squeeze(message.content)
            assert content in text or (message.role == "assistant" and content.rpartition("</think>")[2] in text)


@pytest.mark.parametrize("template", ["auto", "hh", "plain"])
@pytest.mark.parametrize("family", ["chatml", "qwen3", "r1_distill", "llama2"])
@fuzz
@given(text=texts)
def test_fuzz_a_response_gives_its_ids_or_one_line(family, template, text):
    tokenizer = published_tokenizer(family)
    ids = ids_or_one_line(encode_response, tokenizer, text, template)
    if ids is not None:
        written = squeeze(tokenizer.decode(ids[:-1]))
        assert squeeze(re.sub(r"^\s*<think>", "", text)) in written
        assert not set(tokenizer.all_special_ids) & set(ids[:-1])
