"""Tokenizer folders of any content: a tokenizer that splits text, or one line that says what is wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fuzz import damaged, damages, fuzz

from jaxrm.data.tokenizer import load_tokenizer, save_tokenizer, token_ranges
from jaxrm.errors import UserError

JSON_FILES = ["tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "generation_config.json"]
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(
            [0, 1, -1, 3, 500, 10**9, 2**40, 1.5, "", "<s>", "</s>", "<unk>", "<new>", "a", "\ud800", "\n"]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["content", "special", "3", "500", "-1", "x", "lstrip"]), inner, max_size=3),
    ),
    max_leaves=6,
)
NAMES = [
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "chat_template",
    "model_max_length",
    "add_bos_token",
    "legacy",
    "tokenizer_class",
    "<new>",
    "</s>",
    "a",
]


def usable_or_refused(folder):
    try:
        tokenizer = load_tokenizer(str(folder))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, error
        return
    ids = tokenizer("how are you <s> </s> <new> 12", add_special_tokens=False)["input_ids"]
    assert all(isinstance(id_, int) and id_ >= 0 for id_ in ids)
    token_ranges(tokenizer, 1000)
    assert all(tokenizer.convert_tokens_to_ids(token) == id_ for token, id_ in tokenizer.get_vocab().items())


def write_settings(draw, folder):
    for name in draw(st.sets(st.sampled_from(JSON_FILES))):
        values = draw(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
        content = json.dumps(values).encode()
        (folder / name).write_bytes(damaged(content, draw(damages)) if draw(st.integers(0, 3)) == 0 else content)


@pytest.fixture
def clean(tmp_path):
    """Function that empties a folder."""

    def empty():
        for file in tmp_path.iterdir():
            file.unlink()
        return tmp_path

    return empty


@fuzz
@given(data=st.data())
def test_fuzz_a_sentencepiece_folder_is_read_or_refused(llama_folder, clean, data):
    folder, content = clean(), (llama_folder / "tokenizer.model").read_bytes()
    is_damaged = data.draw(st.booleans())
    (folder / "tokenizer.model").write_bytes(damaged(content, data.draw(damages)) if is_damaged else content)
    write_settings(data.draw, folder)
    usable_or_refused(folder)


@fuzz
@given(data=st.data())
def test_fuzz_a_tokenizer_json_is_read_or_refused(chatml_tokenizer, tmp_path_factory, clean, data):
    source, folder = tmp_path_factory.getbasetemp() / "chatml", clean()
    if not source.exists():
        save_tokenizer(chatml_tokenizer, source)
    for file in source.iterdir():
        content = file.read_bytes()
        is_damaged = data.draw(st.integers(0, 2)) == 0
        (folder / file.name).write_bytes(damaged(content, data.draw(damages)) if is_damaged else content)
    if data.draw(st.booleans()):
        write_settings(data.draw, folder)
    usable_or_refused(folder)
