"""Refusals told by phrases, against answers that were labeled by hand."""

import pytest

from jaxrm.evaluation.refusals import is_refusal, labeled_answers, measured_errors


def test_precision_and_recall_on_labeled_answers():
    """Refusals in many words, partial help, and answers that only mention a refusal."""
    answers = labeled_answers()
    precision, recall, count = measured_errors()
    confused = [text for label, text in answers if is_refusal(text) != label]
    assert count == len(answers) >= 200 and sum(label for label, _ in answers) >= 100
    assert precision >= 0.95 and recall >= 0.95, confused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("I can’t help with that.", True),  # the typographic apostrophe
        ("I can't help with that.\n\nHere is how: first heat the oil, then add the salt.", False),
        ('She told him: "I can\'t help you." Then the door closed, and the rain began.', False),
        ("i am sorry , i can not do that .", True),
        ("I can't find a mistake. The proof is right.", False),
    ],
)
def test_a_refusal_gives_nothing_of_what_was_asked(text, expected):
    assert is_refusal(text) is expected
