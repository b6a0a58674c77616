import copy
import json

import numpy as np
import pytest

from jaxrm.data.tasks import write_task
from jaxrm.data.tokenizer import (
    Vocabulary,
    first_without_row,
    load_tokenizer,
    pad_apart_from,
    save_tokenizer,
    token_ranges,
    token_texts,
    unreadable_by,
)
from jaxrm.errors import UserError

MESSAGES = [{"role": "user", "content": "what 12"}]


def reference(folder):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_gemma_model_file_gives_the_ids_of_sentencepiece(gemma_folder, tricky_texts):
    tokenizer, expected = load_tokenizer(str(gemma_folder)), reference(gemma_folder)
    # Text that spells a control piece out is an ordinary special token in transformers; templates.py breaks it up.
    for text in [t for t in tricky_texts if "<s>" not in t] + ["<start_of_turn>user\nhow<end_of_turn>\n", "<h1>a"]:
        assert ids_of(tokenizer, text) == expected.encode(text), text
        assert tokenizer(text)["input_ids"] == [expected.bos_id(), *expected.encode(text)], text
        assert tokenizer.decode(expected.encode(text)) == text
    assert len(tokenizer) == expected.get_piece_size()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)


def test_llama_model_file_gives_the_ids_of_sentencepiece(llama_folder, tricky_texts):
    tokenizer, expected = load_tokenizer(str(llama_folder)), reference(llama_folder)
    for text in [t for t in tricky_texts if "<s>" not in t]:
        assert ids_of(tokenizer, text) == expected.encode(text), text
        assert tokenizer(text)["input_ids"] == [expected.bos_id(), *expected.encode(text)], text
        assert tokenizer.decode(expected.encode(text)) == text
    assert len(tokenizer) == expected.get_piece_size()
    assert tokenizer.pad_token_id is None


def test_byte_fallback_spells_unknown_characters_in_bytes(llama_folder):
    tokenizer = load_tokenizer(str(llama_folder))
    pieces = tokenizer.convert_ids_to_tokens(ids_of(tokenizer, "😀"))
    assert pieces[-4:] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]


def test_unigram_model_file_gives_the_ids_of_sentencepiece(train_sentencepiece, tmp_path, tricky_texts):
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(model_type="unigram", vocab_size=200))
    tokenizer, expected = load_tokenizer(str(tmp_path)), reference(tmp_path)
    for text in [t for t in tricky_texts if "<" not in t]:
        assert ids_of(tokenizer, text) == expected.encode(text), text


@pytest.mark.parametrize("family", ["gemma", "llama"])
def test_saved_model_file_loads_in_transformers_beside_a_config(family, request, tmp_path, tricky_texts):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(str(request.getfixturevalue(f"{family}_folder")))
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": len(tokenizer)}))
    for again in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(str(tmp_path))):
        assert [again(t)["input_ids"] for t in tricky_texts] == [tokenizer(t)["input_ids"] for t in tricky_texts]
        assert again.special_tokens_map == tokenizer.special_tokens_map


def test_settings_beside_a_model_file_are_kept(llama_folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((llama_folder / "tokenizer.model").read_bytes())
    settings = {
        "chat_template": "{{ messages[0].content }}",
        "pad_token": {"content": "<unk>", "special": True},
        "add_bos_token": False,
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.chat_template == settings["chat_template"]
    assert tokenizer.pad_token == "<unk>"
    assert tokenizer("how")["input_ids"] == ids_of(tokenizer, "how")


def test_saved_folder_is_read_as_written(chatml_tokenizer, tmp_path, tricky_texts):
    save_tokenizer(chatml_tokenizer, tmp_path / "new")
    save_tokenizer(chatml_tokenizer, tmp_path / "new")  # over what is there
    written = {file.name for file in (tmp_path / "new").iterdir()}
    assert written == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    again = load_tokenizer(str(tmp_path / "new"))
    assert [ids_of(again, t) for t in tricky_texts] == [ids_of(chatml_tokenizer, t) for t in tricky_texts]
    assert again.apply_chat_template(MESSAGES, tokenize=False) == "<|im_start|>user\nwhat 12<|im_end|>\n"


def test_gguf_gives_tokenizer_and_chat_template(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    assert len(tokenizer) == 49_152
    assert [ids_of(tokenizer, t) for t in ("<|im_start|>", "<|im_end|>")] == [[1], [2]]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer("how")["input_ids"] == ids_of(tokenizer, "how")
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>user\nwhat 12<|im_end|>\n<|im_start|>assistant\n")


def test_gguf_splits_digits_as_the_model_was_trained(smollm2_tokenizer):
    pieces = smollm2_tokenizer.convert_ids_to_tokens(ids_of(smollm2_tokenizer, "in 1999"))
    assert pieces == ["in", "Ġ", "1", "9", "9", "9"]


def test_gguf_tokenizer_round_trips_text_and_folder(smollm2_tokenizer, smollm2_gguf, tmp_path, tricky_texts):
    for text in tricky_texts:
        assert smollm2_tokenizer.decode(ids_of(smollm2_tokenizer, text)) == text
    save_tokenizer(smollm2_tokenizer, tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert [ids_of(again, t) for t in tricky_texts] == [ids_of(smollm2_tokenizer, t) for t in tricky_texts]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "model.gguf").symlink_to(smollm2_gguf)
    assert load_tokenizer(str(tmp_path / "only")).chat_template == smollm2_tokenizer.chat_template


def write_gguf(file, pieces, scores, kinds, **fields):
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in fields.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_gguf_of_a_sentencepiece_model_gives_its_ids(llama_folder, tmp_path, tricky_texts):
    model = reference(llama_folder)
    size = range(model.get_piece_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in size]
    write_gguf(
        tmp_path / "m.gguf",
        [model.id_to_piece(i) for i in size],
        [model.get_score(i) for i in size],
        kinds,
        add_bos_token=True,
    )
    tokenizer = load_tokenizer(str(tmp_path / "m.gguf"))
    for text in [t for t in tricky_texts if "<s>" not in t]:
        assert tokenizer(text)["input_ids"] == [1, *model.encode(text)], text


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
@pytest.mark.parametrize("name", ["tokenizer.model", "model.gguf", "tokenizer.json"])
def test_damaged_files_are_one_line_errors(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name.split(".")[0]) as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("files", [[], ["a.gguf", "b.gguf"]])
def test_a_folder_without_exactly_one_tokenizer_is_refused(tmp_path, files):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=r"exactly one \.gguf"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("path", ["no/such/folder/here", "missing.gguf", "org/not-downloaded", "../x"])
def test_a_tokenizer_that_is_not_there_is_refused(path):
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(path)


def test_code_in_a_tokenizer_folder_is_not_run(tmp_path, chatml_tokenizer):
    save_tokenizer(chatml_tokenizer, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
    with pytest.raises(UserError):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def any_tokenizer(request, tmp_path):
    kind = request.param
    if kind in ("gemma", "llama"):
        return load_tokenizer(str(request.getfixturevalue(f"{kind}_folder")))
    if kind == "task":
        write_task("safety", tmp_path, seed=0)
        return load_tokenizer(str(tmp_path / "tokenizer"))
    if kind == "unigram":
        model = request.getfixturevalue("train_sentencepiece")(model_type="unigram", vocab_size=200)
        (tmp_path / "tokenizer.model").write_bytes(model)
        return load_tokenizer(str(tmp_path))
    return request.getfixturevalue(f"{kind}_tokenizer")


each_tokenizer = pytest.mark.parametrize(
    "any_tokenizer", ["gemma", "llama", "unigram", "chatml", "task", "smollm2"], indirect=True
)


@each_tokenizer
def test_token_texts_join_to_the_decoded_text(any_tokenizer, tricky_texts):
    for text in tricky_texts:
        ids = any_tokenizer(text)["input_ids"]
        texts = token_texts(any_tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == any_tokenizer.decode(ids)
    assert token_texts(any_tokenizer, []) == []


@each_tokenizer
@pytest.mark.parametrize("seed", range(3))
def test_token_texts_of_any_ids_join_to_the_decoded_text(any_tokenizer, seed):
    """Broken characters and ids behind the vocabulary, which a model with padded embeddings can emit, included."""
    rng = np.random.default_rng(seed)
    vocabulary = len(any_tokenizer)
    for upper in (vocabulary, vocabulary + 7, min(300, vocabulary)):  # bytes are among the first ids
        for count in rng.integers(0, 80, 40):
            ids = rng.integers(0, upper, count)
            texts = token_texts(any_tokenizer, ids)
            assert len(texts) == count
            assert "".join(texts) == any_tokenizer.decode(ids.tolist())


@pytest.mark.parametrize("any_tokenizer", ["gemma", "llama", "chatml"], indirect=True)
def test_a_character_comes_with_the_token_that_completes_it(any_tokenizer):
    ids = ids_of(any_tokenizer, "stone é😀日 river")
    texts = token_texts(any_tokenizer, ids)
    for char in "é😀日":
        at = texts.index(next(text for text in texts if char in text))
        assert texts[at].strip() == char
    assert "".join(texts[-2:]).endswith("ver")
    assert texts.count("") >= 3 + 2  # of the two characters that are nowhere in the corpus
    assert "\ufffd" not in "".join(texts)


def test_token_texts_show_spaces_and_special_tokens_verbatim(chatml_tokenizer, llama_folder):
    ids = chatml_tokenizer("<|im_start|>a stone river<|im_end|>\n")["input_ids"]
    assert token_texts(chatml_tokenizer, ids) == ["<|im_start|>", "a", " stone", " river", "<|im_end|>", "\n"]
    llama = load_tokenizer(str(llama_folder))
    assert token_texts(llama, llama("the river")["input_ids"]) == ["<s>", " the", " river"]
    assert token_texts(llama, ids_of(llama, "the river")) == ["the", " river"]


def test_an_unfinished_character_is_shown_as_such(chatml_tokenizer, llama_folder):
    for tokenizer in (chatml_tokenizer, load_tokenizer(str(llama_folder))):
        ids = ids_of(tokenizer, "the 😀")[:-1]
        assert "".join(token_texts(tokenizer, ids)).startswith("the \ufffd")
        assert token_texts(tokenizer, ids)[-1] != ""


@pytest.mark.parametrize("any_tokenizer", ["llama", "chatml"], indirect=True)
def test_token_texts_decode_each_token_a_bounded_number_of_times(any_tokenizer, monkeypatch):
    """Words, unknown characters, and bytes that never become a character."""
    broken = [*ids_of(any_tokenizer, "😀")[-2:-1]] * 400
    for ids in (ids_of(any_tokenizer, "the river " * 200), ids_of(any_tokenizer, "😀" * 100), broken):
        counting = copy.copy(any_tokenizer)
        decoded = []
        decode = any_tokenizer.decode
        counting.decode = lambda ids, decode=decode, decoded=decoded, **options: (
            decoded.append(len(ids)) or decode(ids, **options)
        )
        assert "".join(token_texts(counting, ids)) == decode(ids)
        assert 0 < sum(decoded) <= 20 * len(ids)


@pytest.fixture
def llama3_like(corpus):
    """Function to a byte-level tokenizer with Llama 3's special tokens, whose BOS is the first, and further ones."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    def make(*special, **names):
        backend = Tokenizer(BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        first = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"]
        backend.train_from_iterator(
            corpus,
            trainers.BpeTrainer(
                vocab_size=300, initial_alphabet=alphabet, special_tokens=[*first, *special], show_progress=False
            ),
        )
        names = {"bos_token": first[0], "eos_token": first[3]} | names
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)

    return make


@pytest.mark.parametrize(
    ("special", "names", "pad"),
    [
        (["<|reserved_1|>", "<|finetune_right_pad_id|>"], {}, "<|reserved_1|>"),
        (["<|x|>", "<|finetune_right_pad_id|>"], {}, "<|finetune_right_pad_id|>"),
        (["<|x|>"], {}, "<|x|>"),
        ([], {}, "<pad>"),  # a new one, for which the model has a row
        (["<unk>"], {"unk_token": "<unk>"}, "<unk>"),
        (["<|reserved|>"], {"pad_token": "<|begin_of_text|>"}, "<|reserved|>"),
        (["<|reserved|>"], {"pad_token": "<|eot_id|>"}, "<|reserved|>"),
        (["<|reserved|>", "<|own|>"], {"pad_token": "<|own|>"}, "<|own|>"),
    ],
)
def test_a_classifier_pads_with_what_stands_in_no_row(llama3_like, special, names, pad):
    """Never with BOS, an end, or a token that the template writes."""
    tokenizer = llama3_like(*special, **names)
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<|eot_id|>", "<|end_of_text|>")}
    pad_apart_from(tokenizer, ends, 400, "{{ bos_token + '<|start_header_id|>' }}")
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id not in {*ends, tokenizer.bos_token_id, None} and tokenizer.pad_token_id < 400


def test_a_classifier_without_a_token_to_spare_is_refused(llama3_like):
    tokenizer = llama3_like()
    with pytest.raises(UserError, match="no special token that never stands in a row"):
        pad_apart_from(tokenizer, {1, 3}, len(tokenizer), "<|start_header_id|>")


@pytest.mark.parametrize(
    ("ids", "num_rows", "ranges"),
    [
        (range(10), 10, ()),
        (range(10), 12, ((0, 10),)),
        (range(10), 8, ()),  # the others have no row: `first_without_row`
        ([1, 2, 5, 7], 9, ((1, 3), (5, 6), (7, 8))),
        ([0, 2], 3, ((0, 1), (2, 3))),
    ],
)
def test_ranges_of_ids_that_have_a_token(ids, num_rows, ranges):
    class Tokenizer:
        def get_vocab(self):
            return {f"t{id_}": id_ for id_ in reversed(list(ids))}

    assert token_ranges(Tokenizer(), num_rows) == ranges


def test_only_tokens_that_text_can_become_need_a_row(chatml_tokenizer):
    """gemma-3-1b has 262,144 rows, and its tokenizer an image token behind them, which no text becomes."""
    tokenizer = copy.deepcopy(chatml_tokenizer)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    assert len(tokenizer) == rows + 1
    assert first_without_row(tokenizer, rows, tokenizer.chat_template) is None
    assert token_ranges(tokenizer, rows) == ()
    template = "{{ '<image_soft_token>' }}" + tokenizer.chat_template
    assert first_without_row(tokenizer, rows, template) == (rows, "<image_soft_token>")
    tokenizer.add_tokens(["typed"])
    assert first_without_row(tokenizer, rows, tokenizer.chat_template) == (rows + 1, "typed")
    assert first_without_row(tokenizer, rows + 2, template) is None


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "unk_token"])
def test_named_special_tokens_need_a_row(chatml_tokenizer, name):
    tokenizer, rows = copy.deepcopy(chatml_tokenizer), len(chatml_tokenizer)
    tokenizer.add_special_tokens({name: "<new>"})
    assert first_without_row(tokenizer, rows, "") == (rows, "<new>")


def test_a_reader_needs_all_that_the_writer_may_write(chatml_tokenizer):
    rows, larger = len(chatml_tokenizer), copy.deepcopy(chatml_tokenizer)
    larger.add_tokens(["extra"])
    small, large = Vocabulary(chatml_tokenizer, rows, "the reader"), Vocabulary(larger, rows + 1, "the writer")
    assert unreadable_by(small, small) is None
    assert unreadable_by(large, small) is None
    message = f"the writer has 'extra', id {rows}, for which the reader has no token"
    assert unreadable_by(small, large) == message
    assert unreadable_by(small._replace(size=rows + 9), large) == message  # a row alone is no token
    assert unreadable_by(small, large._replace(size=rows)) is None  # which it never writes
