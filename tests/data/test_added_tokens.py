"""Added tokens beside a sentencepiece model: their ids, and the ids of text around them, as transformers 5 has them."""

import json

import pytest

from jaxrm.data.tokenizer import load_tokenizer
from jaxrm.errors import UserError

SYMBOLS = ["<u>", "[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]"]
TEXTS = [
    "how are you",
    "<u>how",
    "the <u> winter",
    "a<u>b <u><u> c",
    "<u>",
    "<|im_start|>user\nhow<|im_end|>\n",
    "x <|im_end|>y",
    "<|im_start|><u>a",
    "two  spaces\n\n and a break\n",
]


def listed(content, special=True, normalized=False, **flags):
    flags = {"lstrip": False, "rstrip": False, "single_word": False} | flags
    return {"content": content, "special": special, "normalized": normalized, **flags}


@pytest.fixture(scope="module")
def models(train_sentencepiece):
    """Bytes of a model that puts a space before a text, and of one that does not."""
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": SYMBOLS,
    }
    return {prefix: train_sentencepiece(add_dummy_prefix=prefix, **settings) for prefix in (True, False)}


@pytest.fixture
def write(models, tmp_path):
    """Function that writes a folder: the model, and the files beside it."""
    import sentencepiece

    def write(prefix=True, **files):
        (tmp_path / "tokenizer.model").write_bytes(models[prefix])
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text)
        return tmp_path, sentencepiece.SentencePieceProcessor(model_proto=models[prefix])

    return write


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("legacy", [None, True, False])
def test_listed_tokens_are_those_of_transformers(write, prefix, legacy):
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    _, model = write(prefix)
    size, free = model.get_piece_size(), model.piece_to_id("[UNUSED_TOKEN_1]")
    decoder = {
        str(size): listed("<|im_start|>"),
        str(size + 1): listed("<|im_end|>"),
        str(size + 2): listed("<think>", special=False),
        str(free): listed("<|plugin|>"),
    }
    config = {"added_tokens_decoder": decoder, "pad_token": "<|im_end|>", "tokenizer_class": "X"}
    config |= {} if legacy is None else {"legacy": legacy}
    folder, _ = write(prefix, tokenizer_config=config)
    tokenizer, theirs = load_tokenizer(str(folder)), TokenizersBackend.from_pretrained(str(folder))
    contents = ["<|im_start|>", "<|im_end|>", "<think>", "<|plugin|>"]
    assert tokenizer.convert_tokens_to_ids(contents) == [size, size + 1, size + 2, free]
    assert len(tokenizer) == len(theirs) == size + 3 and tokenizer.pad_token_id == size + 1
    for text in [*TEXTS, "a<think>b</think>", "x<|plugin|> y", "[UNUSED_TOKEN_2]"]:
        assert ids(tokenizer, text) == ids(theirs, text), text
        assert tokenizer.decode(ids(tokenizer, text)) == theirs.decode(ids(theirs, text))
        if "<|" not in text and "<t" not in text:
            assert ids(tokenizer, text) == model.encode(text), text


def test_older_files_are_read_too(write):
    """added_tokens.json has the ids, special_tokens_map.json says which are special, and which ends a response."""
    _, model = write()
    size = model.get_piece_size()
    folder, _ = write(
        added_tokens={"<|im_start|>": size, "<|im_end|>": size + 1, "<think>": size + 2},
        special_tokens_map={
            "eos_token": {"content": "<|im_end|>", "lstrip": False},
            "additional_special_tokens": ["<|im_start|>", "<extra>"],
        },
        tokenizer_config={"eos_token": "</s>", "chat_template": "{{ messages }}"},
    )
    (folder / "chat_template.jinja").write_text("{{ newer }}")
    tokenizer = load_tokenizer(str(folder))
    assert ids(tokenizer, "<|im_start|>") == [size] and ids(tokenizer, "<think>") == [size + 2]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", size + 1)
    assert tokenizer.decode([size, size + 2], skip_special_tokens=True) == "<think>"
    assert tokenizer.convert_tokens_to_ids("<extra>") == size + 3  # behind the others, where no id is listed
    assert tokenizer.chat_template == "{{ newer }}"


def test_ids_may_leave_a_gap(write):
    _, model = write()
    size = model.get_piece_size()
    folder, _ = write(added_tokens={"<|im_end|>": size + 40})
    tokenizer = load_tokenizer(str(folder))
    assert ids(tokenizer, "a<|im_end|>")[-1] == size + 40
    assert max(tokenizer.get_vocab().values()) == size + 40


def test_a_saved_folder_gives_the_same_ids(write, tmp_path):
    from jaxrm.data.tokenizer import save_tokenizer

    _, model = write()
    size = model.get_piece_size()
    folder, _ = write(added_tokens={"<|im_start|>": size, "<|im_end|>": size + 1})
    tokenizer = load_tokenizer(str(folder))
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    for text in TEXTS:
        assert ids(again, text) == ids(tokenizer, text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<new>": 20}}, "say that id 20 is '<new>', but there it is '.*'; use the files that belong"),
        ({"added_tokens": {"<u>": 9999}}, "say that '<u>' is id 9999, but there it is 3; use the files that belong"),
        ({"added_tokens": {"<a>": 3, "<b>": 3}}, "added_tokens.json says that id 3 is '<b>', but .* that it is '<a>'"),
        ({"added_tokens": {"<a>": "x"}}, "has the token id 'x'; it must be a whole number"),
        ({"added_tokens": {"<a>": -1}}, "has the token id -1; it must be a whole number"),
        ({"added_tokens": {"<a>": True}}, "has the token id True; it must be a whole number"),
        ({"added_tokens": {"<a>": 10**12}}, "has the token id 1000000000000; it must be a whole number"),
        ({"added_tokens": ["<a>"]}, "holds a JSON list; it must be an object"),
        ({"added_tokens": "{"}, "added_tokens.json is not valid JSON; fetch it again"),
        ({"special_tokens_map": {"eos_token": 3}}, "has 3 where the text of a token belongs"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, r"added_tokens_decoder is \[1\]; it must be an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": "x"}}}, "has 'x' for id 9, which is no token"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"600": listed("<a>"), "601": listed("<a>")}}},
            "have '<a>' twice, with ids 600 and 601",
        ),
        ({"tokenizer_config": {"legacy": "no"}}, "legacy is 'no'; it must be true or false"),
        ({"tokenizer_config": {"additional_special_tokens": "<a>"}}, "it must be a list of tokens"),
    ],
)
def test_files_that_contradict_each_other_are_refused(write, files, message):
    folder, _ = write(**files)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(str(folder))
    assert "\n" not in str(error.value)
