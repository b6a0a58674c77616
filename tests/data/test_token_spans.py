"""Numbers of character spans on the tokens that a policy drew: offsets by decoding, whatever the tokenizer."""

import numpy as np
import pytest

from jaxrm.data.responses import response_text
from jaxrm.data.token_spans import lay_on_tokens, written_after
from jaxrm.data.tokenizer import load_tokenizer

TOKENIZERS = ["chatml", "llama", "gemma"]


@pytest.fixture(scope="module")
def tokenizers(chatml_tokenizer, llama_folder, gemma_folder):
    return {
        "chatml": chatml_tokenizer,
        "llama": load_tokenizer(str(llama_folder)),
        "gemma": load_tokenizer(str(gemma_folder)),
    }


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def on_tokens(tokenizer, ids, spans, end_ids=()):
    return lay_on_tokens(tokenizer, end_ids, response_text(tokenizer, end_ids, ids), spans).tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_number_stands_on_the_last_token_of_its_span(tokenizers, name):
    """Each word of a text that tokens write piece by piece, found again by decoding up to its token."""
    tokenizer, text = tokenizers[name], "the small answer is good and the other is bad"
    ids = ids_of(tokenizer, text)
    assert response_text(tokenizer, (), ids) == text and len(ids) > len(text.split())
    start = 0
    for word in text.split():
        start = text.index(word, start)
        stop = start + len(word)
        (token,) = np.flatnonzero(on_tokens(tokenizer, ids, [(start, stop, 2.0)]))
        assert len(tokenizer.decode(ids[: token + 1]).strip()) >= stop > len(tokenizer.decode(ids[:token]).strip())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_of_several_tokens_is_written_by_the_last(tokenizers, name):
    tokenizer = tokenizers[name]
    ids = ids_of(tokenizer, "a😀b")
    assert len(ids) >= 5  # four bytes, of which each is a token
    found = np.array(on_tokens(tokenizer, ids, [(0, 1, 1.0), (1, 2, 10.0), (2, 3, 100.0)]))
    letters = list(np.flatnonzero(found))
    assert found[letters].tolist() == [1.0, 10.0, 100.0] and letters[1] - letters[0] >= 4 and letters[2] == len(ids) - 1


def test_numbers_of_spans_that_overlap_add(tokenizers):
    tokenizer = tokenizers["chatml"]
    ids = ids_of(tokenizer, "good")
    assert on_tokens(tokenizer, ids, [(0, 4, 1.0), (1, 4, 0.5), (0, 4, -3.0)])[-1] == -1.5
    assert sum(on_tokens(tokenizer, ids, [])) == 0


def test_special_tokens_and_white_space_around_write_nothing(tokenizers):
    """Places are of the text without them; a token of another sort that stays in the text writes its characters."""
    tokenizer = tokenizers["chatml"]
    start, end, pad, think = (
        tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>")
    )
    ids = [start, *ids_of(tokenizer, "  \n"), think, pad, *ids_of(tokenizer, "x"), *ids_of(tokenizer, " "), end]
    response = response_text(tokenizer, (end,), ids)
    assert response == "<think>x"
    found = on_tokens(tokenizer, ids, [(0, 7, 1.0), (7, 8, 2.0), (8, 8, 4.0)], end_ids=(end,))
    assert found[ids.index(think)] == 1 and found[ids.index(pad) + 1] == 2 and found[-1] == 4 and sum(found) == 7


def test_the_empty_span_at_the_end_is_the_whole_response(tokenizers):
    tokenizer = tokenizers["chatml"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = ids_of(tokenizer, "good")
    assert on_tokens(tokenizer, ids, [(4, 4, 1.0)])[-1] == 1
    assert on_tokens(tokenizer, [*ids, end], [(4, 4, 1.0)], end_ids=(end,)) == [0.0] * len(ids) + [1.0]
    assert on_tokens(tokenizer, [end], [(0, 0, 1.0)], end_ids=(end,)) == [1.0]
    assert on_tokens(tokenizer, [], [(0, 0, 1.0)]) == []


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_drawn_at_random_are_laid_as_by_whole_prefixes(tokenizers, name):
    """Bytes that are no text, pieces in an order that no tokenizer writes: the independent loop decodes each prefix."""
    tokenizer, rng = tokenizers[name], np.random.default_rng(0)
    for _ in range(25):
        ids = rng.integers(0, len(tokenizer), size=rng.integers(1, 30)).tolist()
        response = response_text(tokenizer, (), ids)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        before = len(whole) - len(whole.lstrip())
        expected, least = [], len(response)
        for stop in range(len(ids), 0, -1):
            prefix = tokenizer.decode(ids[:stop], skip_special_tokens=True)
            shared = next((i for i, (a, b) in enumerate(zip(prefix, whole, strict=False)) if a != b), len(prefix))
            least = min(least, max(min(shared, len(whole)) - before, 0))
            expected.append(least)
        assert written_after(tokenizer, (), response) == expected[::-1], ids
