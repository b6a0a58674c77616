"""Edit distance against a dynamic program, ROUGE-L by hand and against the library's own words."""

import subprocess
import sys

import numpy as np
import pytest

from jaxrm.evaluation.corrections import CorrectionQuality, correction_quality, edit_distance, rouge_l


def levenshtein(a, b):
    """The textbook table, a row at a time."""
    row = np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        previous, row = row, np.full(len(b) + 1, i)
        for j, y in enumerate(b, 1):
            row[j] = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y))
    return int(row[-1])


def test_edit_distance_by_hand():
    assert edit_distance([1, 2, 3, 4], [1, 3, 4, 5]) == 2  # 2 goes, 5 comes
    assert edit_distance([1, 2, 3], [1, 9, 3]) == 1
    assert edit_distance([], [7, 7]) == 2
    assert edit_distance([], []) == 0


@pytest.mark.parametrize("vocabulary", [2, 5, 100_000])
def test_edit_distance_equals_the_dynamic_program(vocabulary):
    rng = np.random.default_rng(vocabulary)
    for _ in range(40):
        a, b = (rng.integers(0, vocabulary, rng.integers(0, 40)).astype(np.int32) for _ in range(2))
        assert edit_distance(a, b) == edit_distance(b.tolist(), a.tolist()) == levenshtein(a, b)


def test_rouge_l_by_hand():
    # longest common subsequence "police the gunman": 3 of 4 words on each side
    assert rouge_l("police kill the gunman", "police the big gunman") == pytest.approx(0.75)
    # "the gunman", 2 words of 4 and of 5
    assert rouge_l("the gunman kill police", "Police killed, the gunman!  now") == pytest.approx(4 / 9)
    assert rouge_l("same words", "Same words.") == 1.0
    assert rouge_l("", "some") == rouge_l("some", "…") == rouge_l("", "") == 0.0


def test_rouge_l_counts_the_words_of_every_script():
    # für, mich | 2 of 3 and of 2 words
    assert rouge_l("für mich hier", "Für mich") == pytest.approx(0.8)
    # 我 … 你 | characters are words where no spaces are written
    assert rouge_l("我爱你", "我想你") == pytest.approx(2 / 3)
    assert rouge_l("привет мир", "мир привет") == pytest.approx(0.5)


def test_words_of_ascii_text_are_the_library_s_own():
    from rouge_score.rouge_scorer import RougeScorer

    rng = np.random.default_rng(0)
    letters = np.asarray([*"abAB01  .,_-'\n"])
    library = RougeScorer(["rougeL"])
    for _ in range(100):
        a, b = ("".join(rng.choice(letters, 60)) for _ in range(2))
        assert rouge_l(a, b) == library.score(b, a)["rougeL"].fmeasure


def quality(**changes):
    case = {
        "sources": [[1, 2, 3], [4, 5]],
        "corrections": [[1, 9, 3, 8], [4, 5]],
        "chosen": [[1, 9, 3], [6, 7, 8]],
        "source_texts": ["one two three", "four five"],
        "correction_texts": ["one nine three eight", "four five"],
        "chosen_texts": ["one nine three", "six seven eight"],
        "judge_gains": [1.0, -0.5],
    }
    lists = {**case, **changes}
    return correction_quality(lists.pop("sources"), lists.pop("corrections"), lists.pop("chosen"), **lists)


def test_correction_quality_by_hand():
    assert quality() == CorrectionQuality(
        changed=0.5,
        distance_to_source=(2 + 0) / 2,
        distance_to_chosen=(1 + 3) / 2,
        source_to_chosen=(1 + 3) / 2,
        rouge_l_to_chosen=pytest.approx((6 / 7 + 0) / 2),
        source_rouge_l=pytest.approx((2 / 3 + 0) / 2),
        judge_gain=0.25,
        n=2,
    )
    assert quality(judge_gains=None).judge_gain is None


def test_arrays_and_lists_of_ids_are_the_same():
    arrays = {
        name: [np.asarray(ids, np.int32) for ids in value]
        for name, value in {
            "sources": [[1, 2, 3], [4, 5]],
            "corrections": [[1, 9, 3, 8], [4, 5]],
            "chosen": [[1, 9, 3], [6, 7, 8]],
        }.items()
    }
    assert quality(**arrays) == quality()


@pytest.mark.parametrize("changes", [{"corrections": [[1]]}, {"chosen_texts": ["a"]}, {"judge_gains": [1.0]}])
def test_lists_of_unequal_length_are_refused(changes):
    with pytest.raises(AssertionError):
        quality(**changes)


def test_no_responses_are_refused():
    with pytest.raises(AssertionError, match="no responses"):
        correction_quality([], [], [], source_texts=[], correction_texts=[], chosen_texts=[], judge_gains=None)


def test_the_libraries_load_on_use_and_touch_no_network():
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise OSError('network')\n"
        "socket.socket.connect = refuse\n"
        "from jaxrm.evaluation import corrections\n"
        "assert not {'rouge_score', 'rapidfuzz', 'nltk'} & set(sys.modules)\n"
        "assert corrections.rouge_l('a b', 'a b') == 1.0 and corrections.edit_distance([1], [2]) == 1\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
