"""Tokenizers of GGUF files, as the models' own files give them."""

import gguf
import pytest

from jaxrm.data.records import Message
from jaxrm.data.templates import encode_prompt
from jaxrm.data.tokenizer import load_tokenizer, token_ranges
from jaxrm.errors import UserError

WORDS = ["Ġ", "h", "o", "w", "u", "s", "e", "r", "a", "t", "i", "n", "Ċ", "ho", "how", "Ġhow", "howser"]
CONTROL = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
MERGES = ["h o", "ho w", "Ġ how"]  # "howser" is a token that no merges make


def write(file, *, pre="llama-bpe", padding=0, **bools):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    pieces = [*WORDS, *CONTROL]
    kinds = [1] * len(WORDS) + [3] * len(CONTROL) + [5] * padding
    pieces += [f"[PAD{i}]" for i in range(len(pieces), len(pieces) + padding)]
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(len(WORDS))
    writer.add_eos_token_id(len(WORDS) + 1)
    for name, value in bools.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(file)


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_llama_3_takes_a_token_as_a_whole_before_it_merges(tmp_path):
    """As ``ignore_merges`` of its tokenizer.json says: some of its tokens are not reached by merges."""
    assert pieces(load_tokenizer(write(tmp_path / "a.gguf")), "howser how") == ["howser", "Ġhow"]
    assert pieces(load_tokenizer(write(tmp_path / "b.gguf", pre="qwen2")), "howser how") == [
        "how",
        "s",
        "e",
        "r",
        "Ġhow",
    ]


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3"])
def test_llama_3_begins_with_bos_in_named_templates(tmp_path, pre):
    tokenizer = load_tokenizer(write(tmp_path / "a.gguf", pre=pre))
    bos = len(WORDS)
    assert tokenizer("how")["input_ids"] == [bos, WORDS.index("how")]
    assert encode_prompt(tokenizer, [Message("user", "how")], "llama3")[:2] == [bos, bos + 2]


def test_a_file_may_say_whether_bos_comes_first(tmp_path):
    assert load_tokenizer(write(tmp_path / "a.gguf", add_bos_token=False))("how")["input_ids"] == [WORDS.index("how")]
    tokenizer = load_tokenizer(write(tmp_path / "b.gguf", pre="qwen2", add_bos_token=True))
    assert tokenizer("how")["input_ids"] == [len(WORDS), WORDS.index("how")]


def test_what_fills_up_a_vocabulary_is_no_token(tmp_path):
    """llama.cpp calls rows without a token ``[PAD151665]``; they are never drawn, and text does not become them."""
    size = len(WORDS) + len(CONTROL)
    tokenizer = load_tokenizer(write(tmp_path / "a.gguf", padding=3))
    assert len(tokenizer) == size
    assert token_ranges(tokenizer, size + 3) == ((0, size),)


def test_a_piece_that_comes_twice_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "WORDS", [*WORDS, "how"])
    with pytest.raises(UserError, match="has 'how' twice, with ids 14 and 17"):
        load_tokenizer(write(tmp_path / "a.gguf"))


def test_a_model_in_parts_has_the_tokenizer_of_the_first(tmp_path):
    first = write(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"")
    for path in (first, str(tmp_path / "m-00002-of-00002.gguf"), str(tmp_path)):
        assert pieces(load_tokenizer(path), "how") == ["how"]
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(UserError, match=r"part 1 of 2, and m-00002-of-00002\.gguf is not beside it; fetch all 2 parts"):
        load_tokenizer(first)
